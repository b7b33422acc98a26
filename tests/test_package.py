"""The wheel holds every module and template, and is imported from where nothing else is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ('mmdet_ptq', 'pyproject.toml', 'setup.cfg', 'README.md', 'LICENSE')


def pip(*arguments):
    done = subprocess.run(
        [sys.executable, '-m', 'pip', '--disable-pip-version-check', *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_wheel_is_complete(tmp_path):
    source, wheels, empty = tmp_path / 'source', tmp_path / 'wheels', tmp_path / 'empty'
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip('wheel', source, '--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', wheels)
    pip('install', *wheels.iterdir(), '--no-deps', '--no-index', '--target', empty)
    own = [
        path.relative_to(ROOT)
        for path in (ROOT / 'mmdet_ptq').rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    ]
    assert [path for path in own if not (empty / path).is_file()] == []
    program = (
        'import mmdet_ptq, mmdet_ptq.engine; from mmdet_ptq.registry import runtime_names; '
        'print(mmdet_ptq.__file__, *runtime_names())'
    )
    done = subprocess.run(
        [sys.executable, '-c', program],
        cwd=empty,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(empty)},
    )
    file, *runtimes = done.stdout.split()
    assert Path(file).is_relative_to(empty) and len(runtimes) >= 4, done.stderr
