"""Maxima that quantized layers read: OpenVINO computes what was simulated, where its own kernel rounds them."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from mmdet.models import ResNet
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import get_runtime, open_model, settle_biases
from mmdet_ptq.deploy.agreement import compare_layer_inputs
from mmdet_ptq.deploy.openvino.layer_inputs import openvino_inputs
from mmdet_ptq.deploy.openvino.maxima import sort_for_maxima
from mmdet_ptq.testing import predict, tiny_batch, tiny_model_cfg
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.testing.detectors import randomise
from mmdet_ptq.wrapping import freeze_weights, prepare_detector
from mmdet_ptq.wrapping.state import only_read_tensors

openvino = pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")


def model(op_type, axes, keepdims, quantized=True):
    """Extremes of (1, 6, 5, 4), and a pointwise convolution of bytes that reads them."""
    given = [numpy_helper.from_array(np.int64(axes), 'axes')] if axes is not None else []
    constants = dict(scale=np.float32(0.02), zero=np.uint8(128), one=np.float32(0.01))
    nodes = [helper.make_node(op_type, ['x', 'axes'] if given else ['x'], ['most'], name='most', keepdims=keepdims)]
    if quantized:
        nodes += [
            helper.make_node('QuantizeLinear', ['most', 'scale', 'zero'], ['codes']),
            helper.make_node('DequantizeLinear', ['codes', 'scale', 'zero'], ['y']),
        ]
    else:
        nodes.append(helper.make_node('Mul', ['most', 'one'], ['y']))
    graph = helper.make_graph(
        nodes,
        'extremes',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 6, 5, 4])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()] + given,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10))


def run(made, x):
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(ir.to_proto(made)).run(None, dict(x=x))[0]


@pytest.mark.parametrize('keepdims', [0, 1])
@pytest.mark.parametrize('axes', [[1], [-1], [2, 3], None], ids=str)
@pytest.mark.parametrize('op_type', ['ReduceMax', 'ReduceMin'])
def test_the_numbers_are_the_same(op_type, axes, keepdims):
    made = model(op_type, axes, keepdims)
    for node in made.graph:
        if node.op_type == op_type:  # as the exporter tells it
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    x = np.random.default_rng(0).standard_normal((1, 6, 5, 4)).astype(np.float32)
    before = run(made, x)
    assert sort_for_maxima(made.graph) == 1
    assert 'TopK' in {node.op_type for node in made.graph} and op_type not in {node.op_type for node in made.graph}
    after = run(made, x)
    assert after.shape == before.shape and np.array_equal(after, before)


def test_what_no_quantizer_depends_on_stays():
    made = model('ReduceMax', [1], 1, quantized=False)
    assert sort_for_maxima(made.graph) == 0 and 'ReduceMax' in {node.op_type for node in made.graph}


class Extremes(ResNet):
    """Attention of CBAM: by the mean and the maximum over channels, and by the maximum over space."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.mix, self.spatial, self.gate = nn.Conv2d(8, 8, 1), nn.Conv2d(2, 1, 7, padding=3), nn.Conv2d(8, 8, 1)

    def init_weights(self):
        pass

    def forward(self, x):
        x, outs = self.mix(self.maxpool(self.relu(self.norm1(self.conv1(x))))), []
        x = x * torch.sigmoid(self.gate(x.amax((2, 3), keepdim=True)))
        x = x * torch.sigmoid(self.spatial(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)))
        for place, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if place in self.out_indices:
                outs.append(x)
        return tuple(outs)


def test_layers_read_the_maxima_that_were_simulated(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS.module_dict, 'Extremes', Extremes)
    init_default_scope('mmdet')
    cfg = tiny_model_cfg('retinanet')
    cfg['backbone'] = dict(cfg['backbone'], type='Extremes')
    detector = MODELS.build(ConfigDict(cfg))
    randomise(detector, lambda: predict(detector, tiny_batch(16)))
    detector.eval()
    structure = prepare_detector(detector, PTQConfig.from_dict(OBSERVE), lambda: predict(detector, tiny_batch(1)))
    observe_activations(detector, [tiny_batch(2, seed=1)], structure)
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = get_runtime('openvino').export(detector, tmp_path, (1, 3, 64, 64))
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    found = compare_layer_inputs(detector, openvino_inputs(path, image), image, follow=True, within=only_read_tensors)
    assert {'backbone.spatial', 'backbone.gate'} <= {entry.name for entry in found}
    assert min(entry.identical for entry in found) > 0.99
    assert {'backbone.spatial', 'backbone.gate'} <= set(open_model(path).coverage().integer)
