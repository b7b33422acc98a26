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
        assert env['VENV'] == '.venv-python3.10' and cwd == tmp_path
        (tmp_path / env['VENV']).mkdir()
        work_dir = Path(command[command.index('--work-dir') + 1])
        work_dir.mkdir(parents=True)
        rows = [dict(model=model, metrics={'coco/bbox_mAP': figure}) for model, figure in figures.items()]
        (work_dir / 'results.json').write_text(json.dumps(dict(rows=rows)))
        return SimpleNamespace(returncode=returncode)

    monkeypatch.setattr(module.subprocess, 'run', run)
    found = module.try_python('/opt/bin/python3.10', keep=False)
    assert (found == '') == (told == '') and told in found
    assert not (tmp_path / '.venv-python3.10').exists()


def test_a_python_without_a_torch_is_left_out_and_named(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['try_pythons.py', 'python3.10'])
    monkeypatch.setattr(module, 'can_fetch', lambda python: False)
    monkeypatch.setattr(module, 'try_python', lambda *args: pytest.fail('it was tried'))
    assert module.main() == 0 and 'python3.10 is left out: torch' in capsys.readouterr().out
    monkeypatch.setattr(module, 'can_fetch', lambda python: True)
    monkeypatch.setattr(module, 'try_python', lambda *args: 'onnxruntime loses 0.6 points')
    assert module.main() == 1 and 'python3.10: onnxruntime loses 0.6 points' in capsys.readouterr().out


def test_without_space_or_answer_nothing_is_fetched(module, monkeypatch):
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        raise module.subprocess.TimeoutExpired(command, kwargs['timeout'])

    monkeypatch.setattr(module.subprocess, 'run', run)
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**30))
    assert not module.can_fetch('python3.10') and not calls
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**40))
    assert not module.can_fetch('python3.10') and len(calls) == 1
