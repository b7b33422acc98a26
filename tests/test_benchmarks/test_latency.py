"""latency.py and profiles.py on a tiny detector."""

import copy
from pathlib import Path

import pytest
import torch
from benchmark_tools import module, read
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_ptq.deploy import open_model
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing.models import tiny_model_cfg

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


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
