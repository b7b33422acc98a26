"""The set-up: which environment it takes, what it would do, and what stops it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'tools' / 'setup_env.py'


@pytest.fixture
def setup_env(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location('setup_env', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dry_run(folder: Path, **variables: str) -> tuple[int, str]:
    """Runs the script without any environment of the user's but what is given."""
    ours = ('VIRTUAL_ENV', 'CONDA_PREFIX', 'PYTHON', 'STACK', 'TORCH', 'CC', 'CXX', 'CFLAGS', 'MAX_JOBS')
    keep = {k: v for k, v in os.environ.items() if k not in ours}
    env = {**keep, 'VENV': str(folder / 'venv'), **variables}
    done = subprocess.run([sys.executable, SCRIPT, '--dry-run'], env=env, capture_output=True, text=True)
    assert 'Traceback' not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_options_after_the_set_up_belong_to_python(tmp_path):
    code = (
        'import sys; sys.argv = ["setup_env.py", "-c", "print(40 + 2)"]; import setup_env as s; '
        's.foreign_environment = lambda *_: sys.executable; sys.exit(s.main())'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '42'


@pytest.fixture
def bare_python(tmp_path) -> str:
    """An interpreter without any package."""
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'bare'], check=True)
    return str(tmp_path / 'bare' / 'bin' / 'python')


def test_environment_with_the_stack_is_used_as_it_is(tmp_path):
    code, out = dry_run(tmp_path, PYTHON=sys.executable)
    assert code == 0
    assert f'Using the environment of {sys.executable}' in out
    assert not any(word in out for word in ('torch==', 'mmcv==', 'mmdet==', '-m venv'))


def test_bare_python_gets_an_environment_of_its_own(tmp_path, bare_python, setup_env):
    code, out = dry_run(tmp_path, PYTHON=bare_python, TORCH='2.10.0', MAX_JOBS='3')
    assert code == 0
    assert f'{bare_python} -m venv {tmp_path / "venv"}' in out
    assert 'torch==2.10.0' in out
    assert 'MAX_JOBS=3' in out
    for pin in setup_env.extra('openmmlab'):
        assert pin in out
    assert out.index('torch==') < out.index('mmcv==') < out.index('mmdet==')  # mmcv is built against torch
    assert not (tmp_path / 'venv').exists()


def test_maintained_fork(tmp_path, bare_python, setup_env):
    code, out = dry_run(tmp_path, PYTHON=bare_python, STACK='onedl')
    assert code == 0
    assert all(pin in out for pin in setup_env.extra('onedl'))


@pytest.mark.parametrize(
    ('variables', 'sentence'),
    [
        ({'PYTHON': '/no/such/python'}, 'PYTHON=/no/such/python does not run'),
        ({'STACK': 'other'}, 'STACK=other is not known; it is one of openmmlab, onedl'),
    ],
)
def test_bad_request(tmp_path, variables, sentence):
    code, out = dry_run(tmp_path, **variables)
    assert code == 1
    assert sentence in out


@pytest.mark.parametrize('variable', ['CC', 'CXX'])
def test_missing_compiler_stops_before_the_downloads(tmp_path, bare_python, variable):
    code, out = dry_run(tmp_path, PYTHON=bare_python, **{variable: 'no-such-compiler'})
    assert code == 1
    assert 'no-such-compiler cannot be found; install a C++ compiler' in out
    assert 'pip install' not in out


def test_step_is_stamped_only_when_it_finished(tmp_path, setup_env):
    venv, done = setup_env.Venv(tmp_path, 'openmmlab', None, dry_run=False), []
    venv.state.mkdir()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        venv.step('torch', lambda: 'a', interrupted)
    venv.step('torch', lambda: 'a', lambda: done.append(1))
    venv.step('torch', lambda: 'a', lambda: done.append(2))
    venv.step('torch', lambda: 'b', lambda: done.append(3))
    assert done == [1, 3]


def test_failing_command_shows_its_log(tmp_path, setup_env, capsys):
    venv = setup_env.Venv(tmp_path, 'openmmlab', None, dry_run=False)
    venv.state.mkdir()
    venv.lock = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(setup_env.SetupError, match='the whole log is'):
            venv.run('Failing', [sys.executable, '-c', 'raise SystemExit("why it failed")'], 'failing')
    finally:
        os.close(venv.lock)
    assert 'why it failed' in capsys.readouterr().out
