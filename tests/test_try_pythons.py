"""The oldest and the newest Python: which they are, and what counts as a failure."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOLS = Path(__file__).resolve().parent.parent / 'tools'


@pytest.fixture
def module(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(TOOLS))
    module = importlib.import_module('try_pythons')
    monkeypatch.setattr(module, 'ROOT', tmp_path)
    return module


def test_the_ends_are_of_the_search_path_and_of_pyenv(module, monkeypatch, tmp_path):
    places = [tmp_path / f'versions/{version}/bin/python{version}' for version in ('3.9', '3.10', '3.13')]
    for place in places:
        place.parent.mkdir(parents=True)
        place.touch()
    monkeypatch.setenv('PYENV_ROOT', str(tmp_path))
    known = {'python3.11', *map(str, places)}
    monkeypatch.setattr(module, 'probe', lambda python: {} if python not in known else dict(version=(3, 11)))
    assert module.ends() == [str(places[1]), str(places[2])]
    known -= set(map(str, places))
    assert module.ends() == ['python3.11']


@pytest.mark.parametrize(
    ('returncode', 'figures', 'told'),
    [
        (0, dict(float=0.51, simulated=0.509, onnxruntime=0.506), ''),
        (0, dict(float=0.51, simulated=0.509, onnxruntime=0.504), 'onnxruntime loses 0.6 points'),
        (0, dict(float=0.51, simulated=0.51), 'there is no figure of a runtime'),
        (1, dict(float=0.51, simulated=0.51, onnxruntime=0.51), 'the set-up or the demo failed'),
    ],
)
def test_a_lost_point_is_a_failure(module, monkeypatch, tmp_path, returncode, figures, told):
    def run(command, cwd, env):
        assert (env['VENV'], env['TORCH'], cwd) == ('.venv-python3.10', '2.13.0', tmp_path)
        (tmp_path / env['VENV']).mkdir()
        work_dir = Path(command[command.index('--work-dir') + 1])
        work_dir.mkdir(parents=True)
        rows = [dict(model=model, metrics={'coco/bbox_mAP': figure}) for model, figure in figures.items()]
        (work_dir / 'results.json').write_text(json.dumps(dict(rows=rows)))
        return SimpleNamespace(returncode=returncode)

    monkeypatch.setattr(module.subprocess, 'run', run)
    found = module.try_python('/opt/bin/python3.10', '2.13.0', keep=False)
    assert (found == '') == (told == '') and told in found
    assert not (tmp_path / '.venv-python3.10').exists()


def test_the_newest_python_gets_the_newest_torch_and_what_is_missing_is_named(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['try_pythons.py'])
    monkeypatch.setattr(module, 'ends', lambda: ['python3.10', 'python3.13'])
    tried, there = [], {'torch==' + module.TORCH: module.TORCH, 'torch': '2.15.0'}
    monkeypatch.setattr(module, 'fetched', lambda python, torch: there.get(torch))
    monkeypatch.setattr(module, 'try_python', lambda *args: tried.append(args[:2]))
    assert module.main() == 0 and tried == [('python3.10', module.TORCH), ('python3.13', '2.15.0')]
    there.clear()
    tried.clear()
    assert module.main() == 0 and not tried
    assert 'python3.10 is left out: its torch' in capsys.readouterr().out
    there['torch'] = '2.15.0'
    monkeypatch.setattr(module, 'try_python', lambda *args: 'onnxruntime loses 0.6 points')
    assert module.main() == 1 and 'python3.13: onnxruntime loses 0.6 points' in capsys.readouterr().out


def test_what_is_fetched_is_told_by_its_version(module, monkeypatch):
    calls, ends = [], module.subprocess.TimeoutExpired('pip', 1)

    def run(command, **kwargs):
        calls.append(command)
        if ends is not None:
            raise ends
        Path(command[command.index('--dest') + 1], 'torch-2.15.0+cpu-cp313-cp313-linux.whl').touch()

    monkeypatch.setattr(module.subprocess, 'run', run)
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**30))
    assert module.fetched('python3.13', 'torch') is None and not calls
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**40))
    assert module.fetched('python3.13', 'torch') is None and len(calls) == 1
    ends = module.subprocess.CalledProcessError(1, 'pip')
    assert module.fetched('python3.13', 'torch') is None
    ends = None
    assert module.fetched('python3.13', 'torch') == '2.15.0' and calls[-1][-1] == 'torch'
