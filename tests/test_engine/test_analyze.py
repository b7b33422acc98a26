import json

import pytest

from mmdet_ptq.cli import analyze
from mmdet_ptq.testing import tiny_config


@pytest.fixture
def config(tmp_path):
    cfg = tiny_config('retinanet', tmp_path)
    cfg.ptq = dict(
        preset='w8a8_observe',
        calibration=dict(num_images=2, batch_size=2),
        protect=dict(max_tensors=1, candidates=['16bit']),
    )
    path = tmp_path / 'config.py'
    cfg.dump(path)
    return path


@pytest.mark.thorough
def test_the_tool_ranks_draws_and_goes_on(config, tmp_path, capsys, monkeypatch):
    arguments = [str(config), '--images', '1', '--work-dir', str(tmp_path / 'out'), '--device', 'cpu']
    analyze(arguments)
    printed = capsys.readouterr().out
    assert 'sensitivity of parts' in printed and 'sensitivity of tensors' in printed
    first = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())
    assert first['num_images'] == 1 and (tmp_path / 'out' / 'sensitivity.png').is_file()
    # stages of a run in the same folder are its own
    assert not (tmp_path / 'out' / 'stages').exists()
    monkeypatch.setattr('mmdet_ptq.engine.stages.calibrate.prepare_detector', None)
    analyze(arguments)
    assert json.loads((tmp_path / 'out' / 'sensitivity.json').read_text()) == first


@pytest.mark.parametrize(
    'arguments, words',
    [(['--images', '0'], '--images must be at least 1'), (['--preset', 'w8a9'], "Did you mean 'w8a8'")],
)
def test_bad_arguments_are_one_sentence(config, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr('mmdet_ptq.engine.run.load_float_checkpoint', None)
    with pytest.raises(SystemExit) as stopped:
        analyze([str(config), *arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err
