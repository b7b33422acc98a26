"""The version is read before anything is installed, and says what pip and a run that resumes need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import mmdet_ptq
from mmdet_ptq.version import STATE_FORMAT, __version__

ROOT = Path(__file__).resolve().parents[1]


def test_the_version_is_written_as_pip_writes_it():
    assert str(Version(__version__)) == __version__
    assert not Version(__version__).local


def test_the_build_reads_it_without_importing_the_package(monkeypatch):
    # as pyproject names it; setuptools imports the module only where it cannot read the value from the text
    expand = pytest.importorskip('setuptools.config.expand')
    for name in [name for name in sys.modules if name.partition('.')[0] == 'mmdet_ptq']:
        monkeypatch.delitem(sys.modules, name)
    assert expand.read_attr('mmdet_ptq.version.__version__', root_dir=ROOT) == __version__
    assert 'mmdet_ptq' not in sys.modules


def test_the_module_needs_nothing_that_is_installed():
    code = (
        f'import runpy; told = runpy.run_path({str(ROOT / "mmdet_ptq" / "version.py")!r}); print(told["__version__"])'
    )
    # no site-packages at all
    done = subprocess.run([sys.executable, '-I', '-S', '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == __version__, done.stderr


def test_the_package_has_the_same_one():
    assert mmdet_ptq.__version__ == __version__


def test_the_format_of_states_is_that_of_a_version_there_has_been():
    assert Version('0.1.0') <= Version(STATE_FORMAT) <= Version(__version__)
