"""peers.py on a tiny detector: lines, what is taken over, mistakes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmark_tools import module, read

from mmdet_ptq.errors import PTQError

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


def peers_arguments(config, tmp_path, *more):
    return [
        str(config),
        '--out',
        str(tmp_path / 'out.csv'),
        '--work-dir',
        str(tmp_path / 'work'),
        '--images',
        '4',
        '--pairs',
        '1',
        *more,
    ]


def test_peers_measures_and_takes_over(config, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    peers = module('peers')
    peers.main(peers_arguments(config, tmp_path, '--peers', 'ort_minmax'))
    first = read(tmp_path / 'out.csv')
    assert tuple(first[0]) == peers.FIELDS
    assert [line['peer'] for line in first] == ['float', 'ort_minmax']
    line = first[1]
    assert line['detector'] == 'tiny' and line['runtime'] == 'onnxruntime'
    assert float(line['drop_points']) == pytest.approx(100 * (float(first[0]['AP']) - float(line['AP'])), abs=0.05)
    assert int(line['file_bytes']) < int(line['float_file_bytes'])
    assert line['integer_convolutions'] == line['convolutions'] != '0'
    assert float(line['latency_ratio']) > 0
    assert '--peers ort_minmax' in line['command'] and str(tmp_path) not in line['command']

    def again(subject):
        raise RuntimeError('measured a second time')

    monkeypatch.setattr(peers, 'PEERS', dict.fromkeys(peers.PEERS, again))
    peers.main(peers_arguments(config, tmp_path, '--peers', 'ort_minmax'))
    assert read(tmp_path / 'out.csv') == first
    # other calibration images are another measurement
    with pytest.raises(SystemExit):
        peers.main(peers_arguments(config, tmp_path, '--peers', 'ort_minmax', '--seed', '1'))
    assert 'measured a second time' in read(tmp_path / 'out.csv')[1]['note']


def test_a_peer_that_fails_or_is_missing_is_a_line_and_runs_next_time(config, tmp_path, monkeypatch, capsys):
    peers = module('peers')
    outcome = {'error': ValueError('no such\nkernel')}

    def torch_ao(subject):
        if outcome['error']:
            raise outcome['error']
        return [dict(runtime='torch', AP=0.25)]

    monkeypatch.setitem(peers.PEERS, 'float', lambda subject: [dict(runtime='torch', AP=0.5)])
    monkeypatch.setitem(peers.PEERS, 'torch_ao', torch_ao)
    arguments = peers_arguments(config, tmp_path, '--peers', 'torch_ao')
    with pytest.raises(SystemExit, match='^1$'):
        peers.main(arguments)
    assert read(tmp_path / 'out.csv')[1]['note'] == 'failed: ValueError: no such kernel'
    outcome['error'] = PTQError('the package x is not installed; pip install x.')
    peers.main(arguments)  # a peer that is not there is no failure
    assert read(tmp_path / 'out.csv')[1]['note'] == 'skipped: the package x is not installed; pip install x.'
    assert 'tiny, torch_ao: skipped' in capsys.readouterr().out
    outcome['error'] = None
    peers.main(arguments)
    assert [read(tmp_path / 'out.csv')[1][key] for key in ('AP', 'drop_points', 'note')] == ['0.25', '25.0', '']
    monkeypatch.setitem(peers.PEERS, 'float', lambda subject: [dict(runtime='torch', AP=0.75)])
    next(tmp_path.rglob('float.json')).unlink()
    peers.main(arguments)  # what is taken over is compared with the float of now
    assert read(tmp_path / 'out.csv')[1]['drop_points'] == '50.0'


def test_each_of_several_detectors_has_its_own_process(config, tmp_path, monkeypatch):
    peers, commands = module('peers'), []

    def run(command):
        commands.append(command)
        measured = ('float', 'torch_ao')[: 1 + (Path(command[2]) == config)]
        peers.write_csv(
            Path(command[command.index('--out') + 1]),
            [dict(detector=Path(command[2]).stem, peer=peer, note='') for peer in measured],
            peers.FIELDS,
        )
        return SimpleNamespace(returncode=-11)  # NNCF may end the process behind the last line

    monkeypatch.setattr(peers.subprocess, 'run', run)
    more = ('--peers', 'torch_ao', '--cfg-options', 'a.b=1')
    with pytest.raises(SystemExit):
        peers.main([str(config.with_name('other.py')), *peers_arguments(config, tmp_path, *more)])
    assert {'--seed', '--preset', '--images', '--pairs', 'a.b=1'} <= set(commands[0])
    assert [(line['detector'], line['peer'], line['note']) for line in read(tmp_path / 'out.csv')] == [
        ('other', 'float', ''),
        ('other', 'torch_ao', 'failed: its process ended with -11'),
        ('tiny', 'float', ''),
        ('tiny', 'torch_ao', ''),
    ]


def test_the_images_are_those_that_a_run_draws(config, tmp_path):
    peers = module('peers')
    from mmdet_ptq.cli import load_config
    from mmdet_ptq.engine import PTQRunner

    args = SimpleNamespace(work_dir=tmp_path / 'work', cfg_options=[], images=4, seed=3, preset='w8a8_observe')
    subject = peers.Subject(config, args)
    cfg = load_config(str(config), ['ptq.calibration.num_images=4', 'ptq.calibration.seed=3'])
    runner = PTQRunner.from_cfg(cfg)
    assert len(subject.images) == 4
    for mine, sample in zip(subject.images, runner.calibration, strict=True):
        batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']])
        assert np.array_equal(mine, runner.detector.data_preprocessor(batch, False)['inputs'].numpy())


def test_ours_gives_a_line_per_row_of_the_results(config, tmp_path, monkeypatch):
    peers = module('peers')
    rows = [
        dict(model=name, metrics={'coco/bbox_mAP': ap}, size_bytes=12, latency_ratio=ratio)
        for name, ap, ratio in (('float', 0.5, None), ('simulated', 0.49, None), ('onnxruntime', 0.48, 1.234))
    ]
    results = dict(
        rows=rows,
        stages=dict(observe=dict(seconds=2.4), evaluate_float=dict(seconds=9)),
        runtimes=dict(onnxruntime=dict(integer=['a', 'b'], float=['c'])),
    )
    given = []
    monkeypatch.setattr(peers, 'run_ptq', lambda *a: (given.append(a), ([], results))[1])
    args = SimpleNamespace(work_dir=tmp_path / 'work', cfg_options=['a=1'], images=4, seed=3, preset='w4a8')
    simulated, exported = peers.ours()(peers.Subject(config, args))
    assert (simulated['runtime'], simulated['AP'], simulated['integer_convolutions']) == ('simulated', 0.49, None)
    assert (exported['integer_convolutions'], exported['convolutions'], exported['latency_ratio']) == (2, 3, 1.23)
    assert exported['calibration_seconds'] == 2
    ((_, preset, _, options, arguments),) = given
    assert preset == 'w4a8' and arguments == ['--seed', '3']
    assert options == ['ptq.calibration.num_images=4', 'ptq.export=[onnxruntime,openvino]', 'a=1']
    lines = peers.ours('fast', ('b=2',), ('--fast',))(peers.Subject(config, args))
    assert given[1][2] != given[0][2] and given[1][3][2:] == ['b=2', 'a=1']
    assert given[1][4] == ['--seed', '3', '--fast'] and lines[0]['note'] == 'preset w4a8, fast'


def test_a_mistake_is_one_sentence(capsys):
    def main():
        raise PTQError('name another key.')

    with pytest.raises(SystemExit) as stopped:
        module('runs').one_sentence(main)
    assert stopped.value.code == 2 and capsys.readouterr().err == 'error: name another key.\n'


def test_peers_knows_its_peers(capsys):
    with pytest.raises(SystemExit):
        module('peers').main(['x.py', '--out', 'y.csv', '--peers', 'nobody'])
    assert 'nncf_mixed' in capsys.readouterr().err


def test_finished_lines_are_json(config, tmp_path, monkeypatch):
    peers = module('peers')
    monkeypatch.setitem(peers.PEERS, 'float', lambda subject: [dict(runtime='torch', AP=0.5)])
    peers.main(peers_arguments(config, tmp_path, '--peers', 'float'))
    kept = json.loads((tmp_path / 'work' / 'tiny' / 'lines' / 'float.json').read_text())
    assert kept['lines'][0]['AP'] == 0.5 and set(kept['lines'][0]) <= set(peers.FIELDS)
