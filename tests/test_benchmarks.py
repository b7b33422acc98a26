"""The benchmarks' own parts on tiny detectors: command lines, CSV columns, what other tools make of a float graph."""

import copy
import csv
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_ptq.deploy import export_onnx, get_runtime, open_model, quantized_state, save_quantized
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_batch, tiny_coco, tiny_config, tiny_detector, tiny_quantized
from mmdet_ptq.testing.models import tiny_model_cfg

BENCHMARKS = Path(__file__).resolve().parent.parent / 'benchmarks'
SHAPE = (1, 3, 64, 64)


class ForeignConv(nn.Conv2d):
    """As mmcv's Conv2dAdaptivePadding is one."""


pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Benchmarks are scripts beside the package: they import each other by their own names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name):
    return importlib.import_module(name)


@pytest.fixture(scope='module')
def detector():
    return tiny_detector('retinanet')


@pytest.fixture(scope='module')
def images(detector):
    inputs = detector.data_preprocessor(tiny_batch(6), False)['inputs']
    return [inputs[i : i + 1].numpy() for i in range(len(inputs))]


@pytest.fixture(scope='module')
def float_onnx(detector, tmp_path_factory):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    path = tmp_path_factory.mktemp('float') / 'model.onnx'
    export_onnx(detector, path, SHAPE)
    return path


@pytest.fixture(scope='module')
def float_openvino(detector, tmp_path_factory):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    return get_runtime('openvino').export(detector, tmp_path_factory.mktemp('float'), SHAPE)


def assert_close(found, wanted):
    """Eight bits after a few images: close to float, and not float itself."""
    assert [a.shape for a in found] == [b.shape for b in wanted]
    a, b = (np.concatenate([array.ravel() for array in arrays]) for arrays in (found, wanted))
    assert 0 < np.abs(a - b).mean() < 0.2 * b.std()


@torch.no_grad()
def raw(detector, image):
    outputs = detector(torch.from_numpy(image), None, mode='tensor')
    return [tensor.numpy() for group in outputs for tensor in group]


# ------------------------------------------------------------------ other tools' models


@pytest.mark.parametrize('method', ['MinMax', 'Percentile'])
def test_quantize_static_runs_in_our_runtime_class(float_onnx, images, tmp_path, method):
    out = tmp_path / 'static' / 'model.onnx'
    module('peer_models').quantize_onnxruntime(float_onnx, out, images, method)
    model, reference = open_model(out, threads=1), open_model(float_onnx, threads=1)
    assert model.meta == reference.meta
    coverage = model.coverage()
    assert coverage.integer and not coverage.float
    assert_close(model(images[0]), reference(images[0]))
    assert [file.name for file in out.parent.iterdir()] == ['model.onnx']


def test_nncf_runs_in_our_runtime_class(float_openvino, images, tmp_path):
    pytest.importorskip('nncf', reason='needs pip install nncf')
    out = tmp_path / 'nncf' / 'model.xml'
    module('peer_models').quantize_nncf(float_openvino, out, images, 'MIXED')
    model, reference = open_model(out, threads=1), open_model(float_openvino, threads=1)
    assert model.meta == reference.meta
    assert model.coverage().integer
    assert_close(model(images[0]), reference(images[0]))


def test_torch_ao_computes_in_integers_and_leaves_the_detector_alone(detector, images):
    before = copy.deepcopy(detector.state_dict())
    quantized, integer, total = module('peer_models').quantize_torch(detector, images)
    convolutions = [
        m
        for m in quantized.modules()
        if type(m).__module__.startswith('torch.ao.nn.quantized') and hasattr(m, 'weight')
    ]
    assert len(convolutions) == integer == total == sum(isinstance(m, nn.Conv2d) for m in detector.modules())
    assert all(conv.weight().dtype == torch.qint8 for conv in convolutions)
    assert_close(raw(quantized, images[0]), raw(detector, images[0]))
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())


def test_torch_ao_says_which_convolutions_it_does_not_know(detector, images):
    foreign = copy.deepcopy(detector)
    for conv in [m for m in foreign.modules() if isinstance(m, nn.Conv2d)]:
        conv.__class__ = ForeignConv
    with pytest.raises(PTQError, match=r'none of the \d+ convolutions.*not ForeignConv'):
        module('peer_models').quantize_torch(foreign, images)


def test_a_missing_package_is_named(float_openvino, images, tmp_path, monkeypatch):
    peer_models = module('peer_models')
    monkeypatch.setattr(peer_models, 'find_spec', lambda name: None if name == 'nncf' else name)
    with pytest.raises(PTQError, match='nncf is not installed; pip install nncf'):
        peer_models.quantize_nncf(float_openvino, tmp_path / 'model.xml', images)
    assert peer_models.package_version('no-such-package') == 'missing'


def test_the_reader_gives_each_image_once_and_ranges_of_them():
    reader = module('peer_models').ImageReader(['a', 'b', 'c', 'd'])
    assert [reader.get_next() for _ in range(5)] == [{'input': name} for name in 'abcd'] + [None]
    reader.set_range(1, 3)
    assert [reader.get_next() for _ in range(3)] == [{'input': 'b'}, {'input': 'c'}, None]
    assert len(reader) == 4


# ------------------------------------------------------------------ peers.py


@pytest.fixture
def config(tmp_path):
    cfg = tiny_config('retinanet', tmp_path)
    path = tmp_path / 'tiny.py'
    cfg.dump(path)
    return path


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


def read(path):
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


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


# ------------------------------------------------------------------ runtimes.py


def test_sizes_are_of_all_files_of_a_model(tmp_path, monkeypatch):
    runtimes = module('runtimes')
    for folder in ('openvino', 'openvino/float'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'model.bin').write_bytes(bytes(100 if 'float' in folder else 25))
        (tmp_path / folder / 'model.xml').write_bytes(bytes(20 if 'float' in folder else 35))
    rows = [
        dict(model=name, metrics={'coco/bbox_mAP': ap}, size_bytes=size, latency_ratio=None)
        for name, ap, size in (('float', 0.5, 110), ('openvino', 0.49, 60))
    ]
    results = dict(
        rows=rows,
        runtimes=dict(openvino=dict(integer=['a'], float=[])),
        recipe=dict(dataflow=None),
        calibration=dict(num_images=3),
        seed=0,
        date='2026-01-01T00:00',
        versions={},
    )
    monkeypatch.setattr(runtimes, 'run_ptq', lambda *args: (['python', 'ptq.py', '--preset', 'w8a8'], results))
    _, line = runtimes.lines_of(tmp_path / 'config.py', 'w8a8', tmp_path, [], [])
    assert (line['bytes'], line['float_bytes'], line['bytes_ratio']) == (60, 120, 0.5)
    assert line['difference_points'] == -1.0


# ------------------------------------------------------------------ latency.py


def test_a_size_stands_behind_the_path(tmp_path):
    parse = module('latency').parse_subject
    assert parse(str(tmp_path)) == (tmp_path, None)
    assert parse(f'{tmp_path}@320x416') == (tmp_path, (320, 416))
    with pytest.raises(PTQError, match='must end in @HEIGHTxWIDTH'):
        parse(f'{tmp_path}@320')
    with pytest.raises(PTQError, match='neither a config nor a work directory'):
        parse(str(tmp_path / 'nothing'))


def test_the_size_of_the_test_pipeline(config):
    from mmdet_ptq.cli import load_config

    detectors, cfg = module('float_detectors'), load_config(str(config))
    assert detectors.pipeline_size(cfg) == (64, 64)
    cfg.test_dataloader.dataset.pipeline[2].scale = (1333, 800)
    with pytest.raises(PTQError, match='CONFIG@HEIGHTxWIDTH'):
        detectors.pipeline_size(cfg)


def test_random_weights_get_statistics_that_fit():
    detectors = module('float_detectors')
    init_default_scope('mmdet')
    detector = detectors.build_detector(Config(dict(model=tiny_model_cfg('retinanet'))))
    batches = detectors.generated_batches((64, 96), 3, seed=0)
    assert batches[0]['inputs'][0].shape == (3, 64, 96)
    assert not torch.equal(batches[0]['inputs'][0], batches[1]['inputs'][0])
    detectors.settle_norms(detector, batches)
    detector.eval()
    norm = next(m for m in detector.modules() if isinstance(m, nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))  # ReLU writes into it
    inputs = torch.cat([detector.data_preprocessor(copy.deepcopy(batch), False)['inputs'] for batch in batches])
    with torch.no_grad():
        detector(inputs, None, mode='tensor')
    assert seen[0].std().item() == pytest.approx(1, abs=0.1)


def test_latency_of_a_random_detector(config, tmp_path, capsys):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    latency, out = module('latency'), tmp_path / 'latency.csv'
    latency.main(
        [
            f'{config}@64x64',
            '--random-weights',
            '--threads',
            '1',
            '--pairs',
            '2',
            '--images',
            '2',
            '--runtimes',
            'onnxruntime',
            '--profile',
            '--out',
            str(out),
            '--work-dir',
            str(tmp_path / 'latency'),
        ]
    )
    lines = read(out)
    assert tuple(lines[0]) == latency.FIELDS
    assert [(line['runtime'], line['model']) for line in lines] == [
        ('onnxruntime', 'ours'),
        ('onnxruntime', 'quantize_static'),
    ]
    for line in lines:
        assert float(line['float_ms']) > 0 and float(line['int8_ms']) > 0 and float(line['ratio']) > 0
        assert int(line['file_bytes']) < int(line['float_bytes'])
        assert (line['size'], line['weights'], line['threads'], line['pairs']) == ('64x64', 'random', '1', '2')
        assert str(tmp_path) not in line['command']
    assert 'latency.py tiny.py@64x64 --random-weights' in lines[0]['command']
    assert '--runtimes onnxruntime --peers quantize_static nncf --out latency.csv' in lines[0]['command']
    assert lines[0]['peer_ratio'] and lines[0]['static_ratio'] and not lines[1]['peer_ratio']
    told = capsys.readouterr().out
    assert 'tiny, onnxruntime, quantize_static, 1 threads' in told and 'QLinearConv' in told
    # what it exported is what a run of tools/ptq.py leaves
    subject = latency.exported_subject(tmp_path / 'latency' / 'tiny')
    assert set(subject.models) == {'onnxruntime'} and subject.weights == 'trained'


def test_a_work_directory_without_models_is_refused(tmp_path):
    with pytest.raises(PTQError, match=r'holds no exported models.*ptq.export=\[onnxruntime,openvino\]'):
        module('latency').exported_subject(tmp_path)


def test_profile_sorts_and_averages(float_onnx, images):
    profiles = module('profiles')
    times = profiles.profile('onnxruntime', float_onnx, images[0], threads=1, runs=3)
    model = open_model(float_onnx, threads=1)
    convolutions = sum(entry.calls for entry in times if 'Conv' in entry.kind)
    assert convolutions == len(model.meta['layers'])
    assert [entry.milliseconds for entry in times] == sorted((entry.milliseconds for entry in times), reverse=True)
    # each convolution reads the image or a map and its weights, and writes a map
    assert sum(entry.bytes for entry in times) > Path(float_onnx).stat().st_size / 2


def test_profile_tells_what_memory_alone_would_take(capsys):
    profiles = module('profiles')
    assert 1e8 < profiles.memory_bandwidth(1, 8, 2) < 1e13
    profiles.print_profile('a model', [profiles.OperatorTime('Conv', 2, 3.0, 5_000_000)], 1e9)
    assert capsys.readouterr().out.splitlines()[-1].split() == ['Conv', '2', '3.000', '100.0%', '5.000']


def test_finished_lines_are_json(config, tmp_path, monkeypatch):
    peers = module('peers')
    monkeypatch.setitem(peers.PEERS, 'float', lambda subject: [dict(runtime='torch', AP=0.5)])
    peers.main(peers_arguments(config, tmp_path, '--peers', 'float'))
    kept = json.loads((tmp_path / 'work' / 'tiny' / 'lines' / 'float.json').read_text())
    assert kept['lines'][0]['AP'] == 0.5 and set(kept['lines'][0]) <= set(peers.FIELDS)


# ------------------------------------------------------------------ reevaluate.py


def test_finished_runs_are_evaluated_on_other_images(tmp_path):
    cfg, run, other = tiny_config('retinanet', tmp_path), tmp_path / 'w8a8' / 'observed', tmp_path / 'other'
    run.mkdir(parents=True)
    save_quantized(run / 'quantized.pth', quantized_state(*tiny_quantized('retinanet'), cfg.to_dict(), None))
    cfg.dump(tmp_path / 'tiny.py')
    annotations = tiny_coco(other, num_images=5, seed=3)['val']
    module('reevaluate').main(
        [
            str(tmp_path / 'tiny.py'),
            str(run),
            '--work-dir',
            str(tmp_path / 'logs'),
            '--out',
            str(tmp_path / 'out.csv'),
            '--cfg-options',
            f'test_dataloader.dataset.data_root={other}',
            f'test_evaluator.ann_file={annotations}',
        ]
    )
    lines = read(tmp_path / 'out.csv')
    assert [line['run'] for line in lines] == ['float', 'w8a8/observed']
    assert {line['images'] for line in lines} == {'5'}
    for line in lines:
        assert 0 <= float(line['AP']) <= 1


def test_runs_that_are_not_finished_are_refused(tmp_path):
    cfg = tiny_config('retinanet', tmp_path)
    cfg.load_from = None
    with pytest.raises(PTQError, match='no `load_from`'):
        module('reevaluate').reevaluate(cfg, [])
    cfg.load_from = str(tmp_path / 'float.pth')
    with pytest.raises(PTQError, match='has no quantized.pth; finish the run first'):
        module('reevaluate').reevaluate(cfg, [tmp_path])


# ------------------------------------------------------------------ ablation.py


def test_recipes_share_what_precedes_the_global_loss(tmp_path):
    ablation = module('ablation')
    local, trained, other = (
        ablation.before_global(ablation.RECIPES[name])
        for name in ('ours, best format a layer, local', 'ours', 'ours, uniform, local')
    )
    assert local == trained != other
    first, second, third = (tmp_path / name for name in ('first', 'second', 'third'))
    finished = {}
    ablation.begin_with(first, finished, local)
    (first / 'stages').mkdir(parents=True)
    for stage in ('observe', 'reconstruct', 'global', 'evaluate'):
        (first / 'stages' / f'{stage}.pth').write_text(stage)
    ablation.begin_with(second, finished, trained)
    ablation.begin_with(third, finished, other)
    assert sorted(path.stem for path in (second / 'stages').iterdir()) == ['observe', 'reconstruct']
    assert not third.exists()
    # what it has already stays
    (second / 'stages' / 'observe.pth').write_text('its own')
    ablation.begin_with(second, finished, trained)
    assert (second / 'stages' / 'observe.pth').read_text() == 'its own'


def test_a_seed_is_of_the_images_and_of_the_training(tmp_path, monkeypatch):
    runs, given = module('runs'), []
    row = dict(metrics={'coco/bbox_mAP': 0.5}, size_bytes=1)
    results = dict(
        rows=[dict(row, model='float'), dict(row, model='simulated')],
        stages={},
        seed=2,
        date='2026-01-01',
        coverage=dict(integer_mac_share=1.0),
        calibration=dict(num_images=3),
        versions={},
    )
    monkeypatch.setattr(runs, 'run_ptq', lambda *args: (given.append(args), (['', '', '--preset', 'w4a4'], results))[1])
    module('ablation').main(
        [
            str(tmp_path / 'tiny.py'),
            '--bits',
            'w4a4',
            '--recipes',
            'ours',
            'rounding',
            '--seeds',
            '0',
            '2',
            '--out',
            str(tmp_path / 'out.csv'),
            '--work-dir',
            str(tmp_path / 'work'),
        ]
    )
    assert [list(args[4]) for args in given] == [[], [], ['--seed', '2'], ['--seed', '2']]
    assert len({args[2] for args in given}) == 4
    assert '--preset w4a4 --seed 2 --cfg-options ptq.reconstruct=None' in read(tmp_path / 'out.csv')[3]['command']


def test_shortened_recipes_say_so():
    ablation = module('ablation')
    assert ablation.shortened(ablation.RECIPES['ours'], 300, None) == ([], '')
    assert ablation.shortened(ablation.RECIPES['ours'], 300, 100) == (['ptq.global_loss.iters=100'], ' (100 steps)')
    options, told = ablation.shortened(ablation.RECIPES['qdrop'], 300, 100)
    assert 'ptq.reconstruct.iters=300' in options and told == ' (300 iterations)'
    # as published, and raised where the rounding could not move otherwise
    assert [ablation.rounding_rate(iters) for iters in (20000, 10000, 300)] == [1e-3, 2e-3, 1e-2]
    assert 'ptq.reconstruct.rounding_lr=0.01' in options
    for name in ('rounding', 'ours, uniform, local'):
        assert ablation.shortened(ablation.RECIPES[name], 300, 100) == (list(ablation.RECIPES[name]), '')


def test_cost_of_simulation_is_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'quantized.pth'
    detector, structure = tiny_quantized('retinanet')
    save_quantized(path, quantized_state(detector, structure, dict(model=tiny_model_cfg('retinanet')), None))
    monkeypatch.setattr(
        'sys.argv',
        [
            str(BENCHMARKS / 'overhead.py'),
            str(path),
            '--size',
            '512',
            '512',
            '--batch-size',
            '4',
            '--pairs',
            '1',
            '--threads',
            '1',
        ],
    )
    capsys.readouterr()  # what the preparation logged
    module('overhead').main()
    measured = json.loads(capsys.readouterr().out)
    assert measured['forward_simulated_over_float']['ratio'] > 0
    assert measured['memory_bytes']['train'] > 0 and measured['memory_bytes']['calibrate'] > 0
