"""The one program: what it answers at once, what a run shows, where results go."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet_ptq import __version__, cli
from mmdet_ptq.config.presets import PRESETS
from mmdet_ptq.registry import runtime_names
from mmdet_ptq.testing import tiny_config

ROOT = Path(__file__).resolve().parent.parent
# a console script, as pip makes it, that tells what it has imported
SCRIPT = """
import sys
from mmdet_ptq.cli import main
try:
    main()
finally:
    print('heavy:', [name for name in ('torch', 'mmengine', 'rich', 'numpy') if name in sys.modules])
"""


@pytest.fixture
def program(tmp_path):
    """Runs the program in a process of its own; returns its output."""

    def run(*arguments: str) -> str:
        (tmp_path / 'mmdet-ptq').write_text(SCRIPT)
        done = subprocess.run(
            [sys.executable, tmp_path / 'mmdet-ptq', *arguments],
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


# imports the package where nothing is there to be mended, and tells whether it would have been
IMPORTS = """
import multiprocessing, sys, types
told = types.ModuleType('mmdet_ptq.compat')
told.apply_workarounds = lambda: print('mended', flush=True)

def work():
    sys.modules['mmdet_ptq.compat'] = told
    import mmdet_ptq

if __name__ == '__main__':
    if 'spawn' in sys.argv:
        process = multiprocessing.get_context('spawn').Process(target=work)
        process.start()
        process.join()
    else:
        work()
"""


@pytest.mark.parametrize(
    ('name', 'arguments', 'mended'),
    [('mmdet-ptq', (), False), ('mmdet-ptq', ('spawn',), True), ('train.py', (), True), ('ptq.py', (), True)],
)
def test_all_but_our_own_programs_are_mended_by_the_import(tmp_path, name, arguments, mended):
    (tmp_path / name).write_text(IMPORTS)
    done = subprocess.run(
        [sys.executable, tmp_path / name, *arguments],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, 'mended\n' if mended else ''), done.stderr


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(sys, 'argv', ['mmdet-ptq'])
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)


@pytest.mark.parametrize('arguments', [('--help',), ('run', '--help'), ('export', '--help'), ('--version',)])
def test_help_is_there_at_once(program, arguments):
    *told, heavy = program(*arguments).splitlines()
    assert told and heavy == 'heavy: []'


def test_help_names_commands_presets_and_folders(capsys):
    cli.main([])
    told = capsys.readouterr().out
    for name in (*cli.COMMANDS, *PRESETS):
        assert name in told
    for command in (cli.ptq, cli.analyze):
        with pytest.raises(SystemExit):
            command(['--help'])
        told = ' '.join(capsys.readouterr().out.split())
        assert 'in it a folder named after the preset' in told and all(name in told for name in PRESETS)


def test_names_that_are_read_without_imports_are_the_true_ones():
    assert cli.preset_names() == list(PRESETS)
    assert cli.runtime_folders() == runtime_names()


def test_the_version(capsys):
    cli.main(['--version'])
    assert capsys.readouterr().out == f'mmdet-ptq {__version__}\n'


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(['exprot'])
    assert stopped.value.code == 2 and "Did you mean 'export'?" in capsys.readouterr().err


@pytest.mark.parametrize('name', ['yolox/yolox_nano_w8a8_coco.py', 'configs/yolox/yolox_nano_w8a8_coco.py'])
def test_recipes_are_found_from_anywhere(name):
    assert cli.load_config(name).ptq.preset


def test_a_config_of_ones_own_goes_before_a_recipe_of_its_name(tmp_path):
    (tmp_path / 'ssdlite_mbv2_ptq.py').write_text('mine = 1')
    assert cli.load_config('ssdlite_mbv2_ptq.py').mine == 1


@pytest.fixture(scope='module')
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('command')
    cfg = tiny_config('retinanet', folder)
    cfg.ptq = dict(preset='w8a8_observe', calibration=dict(num_images=3, batch_size=3))
    cfg.pop('work_dir')
    cfg.dump(folder / 'tiny.py')
    return folder / 'tiny.py'


def test_a_dry_run_tells_the_plan_and_stops(config_file, monkeypatch, capsys):
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.evaluate_float', lambda run: pytest.fail('it went on'))
    cli.main(['run', str(config_file), '--dry-run', '--cfg-options', 'ptq.overrides.neck=float'])
    told = capsys.readouterr().out
    for words in ('the plan:', 'RetinaNet', 'neck.', '5 because its input', '3 images', 'evaluate float'):
        assert words in told, told
    with pytest.raises(SystemExit):
        cli.main(['run', str(config_file), '--dry-run', '--cfg-options', 'ptq.overrides.nekk=float'])
    assert "Did you mean 'neck" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('export', 'loader'),
    [('[]', 'load_quantized'), pytest.param('[onnxruntime]', 'load_exported', marks=pytest.mark.slow)],
)
def test_a_run_shows_stages_table_and_a_program_that_runs(config_file, tmp_path, capsys, export, loader):
    cli.main([str(config_file), '--cfg-options', f'ptq.export={export}'])
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert shown.err == '' and '\r' not in shown.out
    assert not [line for line in lines if 'mmengine' in line or 'Average Precision' in line or 'model = dict' in line]
    stages = json.loads((tmp_path / 'work_dirs/tiny/w8a8_observe/results.json').read_text())['stages']
    for stage in stages:
        assert sum(line.startswith(f'{stage.replace("_", " "):<28} ') for line in lines) == 1, stage
    assert len(lines) < 70
    alone = [line for line in lines if line.startswith('run it without mmdet: ')]
    assert len(alone) == ('onnxruntime' in export)
    (log,) = tmp_path.glob('work_dirs/tiny/w8a8_observe/*/*.log')
    kept = log.read_text()
    for words in ('System environment', 'model = dict', 'Average Precision', 'Hooks will be executed'):
        assert words in kept
    start = lines.index('run it in mmdet:' if alone else 'run it:') + 1
    program = '\n'.join(line.strip() for line in lines[start : start + 3])
    assert loader in program and "('work_dirs/tiny/w8a8_observe/" in program
    exec(compile(program, 'program', 'exec'), {})
    assert 'bboxes' in capsys.readouterr().out
    for line in alone:
        command = shlex.split(line.removeprefix('run it without mmdet: python '))
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0 and Path('detections.png').is_file(), done.stderr
    cli.main([str(config_file), '--preset', 'w8a8', '--dry-run', '--verbose'])
    assert 'System environment' in capsys.readouterr().out
    assert {path.name for path in Path('work_dirs/tiny').iterdir()} == {'w8a8_observe', 'w8a8'}
