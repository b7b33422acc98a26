"""What other tools make of a float graph."""

import copy

import onnx
import pytest
import torch
from benchmark_tools import ForeignConv, assert_close, module, raw
from onnx import numpy_helper
from torch import nn

from mmdet_ptq.deploy import open_model
from mmdet_ptq.errors import PTQError

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


@pytest.mark.parametrize(('method', 'narrow'), [('MinMax', False), ('MinMax', True), ('Percentile', False)])
def test_quantize_static_runs_in_our_runtime_class(float_onnx, images, tmp_path, method, narrow):
    out = tmp_path / 'static' / 'model.onnx'
    module('peer_models').quantize_onnxruntime(float_onnx, out, images, method, narrow)
    model, reference = open_model(out, threads=1), open_model(float_onnx, threads=1)
    assert model.meta == reference.meta
    coverage = model.coverage()
    assert coverage.integer and not coverage.float
    assert_close(model(images[0]), reference(images[0]))
    assert [file.name for file in out.parent.iterdir()] == ['model.onnx']
    weights = [
        numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer if t.data_type == onnx.TensorProto.INT8
    ]
    assert (max(abs(weight.astype(int)).max() for weight in weights if weight.ndim > 1) > 64) != narrow


@pytest.mark.parametrize('narrow', [False, True])
def test_nncf_runs_in_our_runtime_class(float_openvino, images, tmp_path, narrow):
    pytest.importorskip('nncf', reason='needs pip install nncf')
    out = tmp_path / 'nncf' / 'model.xml'
    module('peer_models').quantize_nncf(float_openvino, out, images, 'MIXED', narrow)
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
