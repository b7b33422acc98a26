"""The wheel holds every module, template, preset and recipe, and works where nothing else of us is."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from mmdet_ptq import __version__

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ('mmdet_ptq', 'configs', 'pyproject.toml', 'setup.cfg', 'README.md', 'LICENSE')


def pip(*arguments):
    done = subprocess.run(
        [sys.executable, '-m', 'pip', '--disable-pip-version-check', *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def run(folder, *command):
    env = {**os.environ, 'PYTHONPATH': str(folder)}
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_recipe(path):
    return path.suffix in ('.py', '.pth') and '__pycache__' not in path.parts


def test_a_wheel_is_complete(tmp_path):
    source, wheels, empty = tmp_path / 'source', tmp_path / 'wheels', tmp_path / 'empty'
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source / name)
    pip('wheel', source, '--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', wheels)
    pip('install', *wheels.iterdir(), '--no-deps', '--no-index', '--target', empty)
    own = [
        path.relative_to(ROOT)
        for path in (ROOT / 'mmdet_ptq').rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    ]
    own += ['mmdet_ptq' / path.relative_to(ROOT) for path in (ROOT / 'configs').rglob('*') if is_recipe(path)]
    assert [path for path in own if not (empty / path).is_file()] == []
    program = (
        'import mmdet_ptq, mmdet_ptq.engine; from mmdet_ptq.registry import runtime_names; from mmdet_ptq import cli; '
        'demo = cli.load_config(str(cli.DEMO)); recipe = cli.load_config("yolox/yolox_nano_w8a8_coco.py"); '
        'print(mmdet_ptq.__file__, demo.load_from, recipe.filename, *runtime_names())'
    )
    file, checkpoint, recipe, *runtimes = run(empty, sys.executable, '-c', program).split()
    assert all(Path(path).is_relative_to(empty) and Path(path).is_file() for path in (file, checkpoint, recipe))
    assert len(runtimes) >= 4
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 'demo ' in run(empty, empty / 'bin' / 'mmdet-ptq', '--help')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor, whoever else computes
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_version_is_the_same_everywhere():
    cited = re.search('^version: (.*)$', (ROOT / 'CITATION.cff').read_text(), re.MULTILINE)
    changed = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    assert cited[1] == changed[1] == __version__
