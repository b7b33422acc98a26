"""Nodes of an exported graph: put in their places; their names where a module is reachable under two names."""

from collections import Counter

import architectures
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from mmdet_ptq.deploy import get_runtime, open_model, settle_biases
from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.deploy.onnx.graph import add_behind, add_constant, add_node, take_place
from mmdet_ptq.testing import tiny_batch, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import quantized_weights
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
SHAPE = (1, 3, 64, 64)


def test_nodes_stand_where_they_were_put_and_are_read_by_whom_they_should_be():
    image = ir.val('image', ir.DataType.FLOAT, (1, 3))
    relu = ir.node('Relu', [image], name='relu')
    out = relu.outputs[0]
    out.name, out.shape, out.type = 'out', image.shape, image.type
    graph = ir.Graph([image], [out], nodes=[relu])
    halved = add_node(relu, 'Mul', [image, add_constant(graph, 'half', np.float32(0.5))], 'halved', shape=image.shape)
    relu.replace_input_with(0, halved)
    clip = add_behind(out, 'Clip', [None, add_constant(graph, 'six', np.float32(6))], 'clip')
    take_place(relu, 'Abs', [halved])
    assert [(node.op_type, node.name) for node in graph] == [('Mul', 'halved'), ('Abs', 'relu'), ('Clip', 'clip')]
    absolute = graph[1].outputs[0]
    assert graph.outputs[0] is clip.outputs[0] and clip.inputs[0] is absolute and absolute.name == 'out'
    assert {(value.dtype, tuple(value.shape)) for node in graph for value in node.outputs} == {(image.dtype, (1, 3))}


@pytest.mark.thorough
@pytest.mark.parametrize('runtime', ['onnxruntime', pytest.param('openvino', marks=pytest.mark.thorough)])
def test_every_call_of_a_shared_layer_has_its_name_and_computes_in_integers(runtime, tmp_path, monkeypatch):
    pytest.importorskip(runtime)
    architectures.register(monkeypatch)
    detector, structure = tiny_quantized('sepbn', dict(OBSERVE, dataflow='auto'))
    settle_biases(detector, structure)
    with torch.no_grad():
        # a normalisation that turns a channel's sign turns its codes, where it goes into the weight
        detector.bbox_head.cls_convs[1][0].bn.weight[:2].neg_()
    path = get_runtime(runtime).export(detector, tmp_path, SHAPE)
    model = open_model(path, 1)
    coverage = model.coverage()
    calls = Counter(name.partition('#')[0] for name in coverage.integer)
    assert set(calls) == set(quantized_weights(detector)) and not coverage.float
    assert [calls[f'bbox_head.{branch}_convs.0.0.conv'] for branch in ('cls', 'reg')] == [2, 2]
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    given = only_read_tensors if runtime == 'openvino' else integer_arithmetic
    with torch.no_grad(), given(detector):
        simulated = [output.numpy() for output in RawOutputs(detector)(image)]
    for ours, theirs in zip(simulated, model(image.numpy()), strict=True):
        assert np.abs(ours - theirs).mean() <= 0.001 * ours.std()
    if path.suffix == '.onnx':
        graph = onnx.load(path).graph
        values = [out for node in graph.node for out in node.output] + [entry.name for entry in graph.initializer]
        for names in ([node.name for node in graph.node if node.name], values):
            assert len(names) == len(set(names))
