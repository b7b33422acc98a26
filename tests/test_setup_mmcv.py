"""mmcv as few translation units: which sources are merged, what happens where that fails, which wheel is taken."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / 'tools'
SOURCES = ('pybind', 'nms', 'roi_align', 'deform_conv', 'cpu/nms', 'cpu/roi_align', 'cpu/psamask', 'cpu/deform_conv')


@pytest.fixture
def setup_mmcv(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module('setup_mmcv')


def included(unit: Path) -> list[Path]:
    lines = unit.read_text().splitlines()
    return [unit.parent / line.split('"')[1] for line in lines if line.startswith('#include')]


def test_every_source_is_compiled_once_and_as_it_was(tmp_path, setup_mmcv):
    (tmp_path / 'cpu').mkdir()
    for name in SOURCES:
        (tmp_path / f'{name}.cpp').write_text(f'// {name}\n')
    setup_mmcv.merge_sources(tmp_path)
    units = [*tmp_path.glob('*.cpp'), *tmp_path.glob('cpu/*.cpp')]
    alone = {'pybind.cpp', 'cpu/roi_align.cpp', 'cpu/psamask.cpp'}
    assert {u.relative_to(tmp_path).as_posix() for u in units} == {*alone, 'unit_0.cpp', 'unit_1.cpp', 'cpu/unit.cpp'}
    compiled = [part.read_text() for unit in units for part in (included(unit) or [unit])]
    assert sorted(compiled) == sorted(f'// {name}\n' for name in SOURCES)


# as mmcv says it, in its four ways
SETUP = b"""\
args = {
    'nvcc': [cuda_args, '-std=c++14'] if cuda_args else ['-std=c++14'],
    'cxx': ['-std=c++14'],
}
args['cxx'] = ['-Wall', '-std=c++17']
args['nvcc'] += ['-std=c++17']
"""


class Builds:
    """An environment in which every command succeeds but those that build what a unit of several files is in."""

    def __init__(self, folder: Path, merged_builds: bool) -> None:
        self.state, self.python, self.dry_run, self.merged_builds = folder, 'python', False, merged_builds
        self.built, self.installed, self.setups = [], [], []

    def dists(self, *names):
        return ['torch-2.13.0+cpu']

    def minor_version(self):
        return list(sys.version_info[:2])

    def imports(self, statement):
        return 'no GPU'

    def pip(self, name, *arguments):
        self.installed.append(Path(arguments[-1]).name)

    def run(self, what, command, log_name, **kwargs):
        folder = Path(command[-1])
        if 'download' in command:
            folder = Path(command[-2])
            folder.mkdir()
            with tarfile.open(folder / 'mmcv-2.1.0.tar.gz', 'w:gz') as archive:
                setup = tarfile.TarInfo('mmcv-2.1.0/setup.py')
                setup.size = len(SETUP)
                archive.addfile(setup, io.BytesIO(SETUP))
                for name in SOURCES:
                    entry = tarfile.TarInfo(f'mmcv-2.1.0/mmcv/ops/csrc/pytorch/{name}.cpp')
                    archive.addfile(entry, io.BytesIO())
            return
        merged = bool(list(folder.rglob('unit*.cpp')))
        self.setups.append((folder / 'setup.py').read_text())
        self.built.append(merged)
        if merged and not self.merged_builds:
            from setup_parts import SetupError

            raise SetupError('"Compiling mmcv" failed.')
        wheel = self.state / 'mmcv-source' / 'wheel'
        wheel.mkdir()
        tags = f'cp{sys.version_info[0]}{sys.version_info[1]}'
        (wheel / f'mmcv-2.1.0-{tags}-{tags}-{PLATFORM}.whl').touch()


PLATFORM = sysconfig.get_platform().replace('-', '_').replace('.', '_')


@pytest.mark.parametrize('merged_builds', [True, False])
def test_plain_build_is_the_way_out(tmp_path, setup_mmcv, monkeypatch, capsys, merged_builds):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'state').mkdir()
    venv = Builds(tmp_path / 'state', merged_builds)
    setup_mmcv.Mmcv(venv, 'mmcv==2.1.0').install()
    assert venv.built == ([True] if merged_builds else [True, False])
    assert all('-std' not in setup for setup in venv.setups)
    found = {}
    exec(venv.setups[0], {'cuda_args': '-x'}, found)
    assert found['args'] == dict(nvcc=['-x'], cxx=['-Wall'])
    assert venv.installed[0].startswith('mmcv-2.1.0-') and not (venv.state / 'mmcv-source').exists()
    assert ('compiled file by file instead' in capsys.readouterr().out) is not merged_builds
    # the second time the wheel is there
    setup_mmcv.Mmcv(venv, 'mmcv==2.1.0').install()
    assert len(venv.built) == 1 + (not merged_builds)


def test_a_wheel_of_another_platform_or_python_is_not_taken(tmp_path, setup_mmcv, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'state').mkdir()
    venv = Builds(tmp_path / 'state', True)
    mmcv = setup_mmcv.Mmcv(venv, 'mmcv==2.1.0')
    mmcv.wheel_cache().mkdir(parents=True)
    own = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    for name in (f'{own}-{own}-linux_sparc', f'cp39-cp39-{PLATFORM}', f'{own}-{own}t-{PLATFORM}'):
        (mmcv.wheel_cache() / f'mmcv-2.1.0-{name}.whl').touch()
    mmcv.install()
    assert venv.built == [True] and own in venv.installed[0] and PLATFORM in venv.installed[0]


def test_operators_that_do_not_work_are_built_plainly_next_time(tmp_path, setup_mmcv, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'state').mkdir()
    venv = Builds(tmp_path / 'state', True)
    mmcv = setup_mmcv.Mmcv(venv, 'mmcv==2.1.0')
    mmcv.install()
    with pytest.raises(setup_mmcv.SetupError, match='built without working operators'):
        mmcv.check_operators()
    mmcv.install()
    assert venv.built == [True, False]


@pytest.mark.parametrize('python', ['python3.10', 'python3.13', 'python3.14', sys.executable])
def test_what_exec_sets_is_found_by_locals(python, tmp_path, setup_mmcv):
    """As the `setup.py` of mmcv reads its version."""
    if shutil.which(python) is None or subprocess.run([python, '-c', ''], capture_output=True).returncode:
        pytest.skip(f'there is no {python}')
    (tmp_path / 'sitecustomize.py').write_text(setup_mmcv.LOCALS_OF_EXEC)
    (tmp_path / 'setup.py').write_text(
        "def version():\n    exec(compile('__version__ = \"2.1.0\"', 'version.py', 'exec'))\n"
        "    return locals()['__version__']\n\n\n"
        "space = {}\nexec('a = 1', space)\nexec('b = 2')\nprint(version(), space['a'], b)\n"
    )
    env = dict(os.environ, PYTHONPATH=str(tmp_path))
    done = subprocess.run([python, tmp_path / 'setup.py'], capture_output=True, text=True, env=env)
    assert done.stdout == '2.1.0 1 2\n', done.stderr
