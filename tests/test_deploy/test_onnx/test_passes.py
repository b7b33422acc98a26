"""Changes of a graph that let a runtime compute it in integers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

onnxruntime = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
ir = pytest.importorskip('onnx_ir', reason="needs pip install 'mmdet-ptq[onnxruntime]'")

from mmdet_ptq.deploy.onnx import passes  # noqa: E402
from mmdet_ptq.deploy.onnx.graph import own_constants  # noqa: E402


@pytest.fixture
def graph():
    """A linear layer on (1, 20, 32), as torch exports it: its weight behind a Transpose, its bias flat."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    constants = dict(
        # as 'safe' weights are: products of larger ones saturate on processors without VNNI
        w=rng.integers(-63, 64, (16, 32)).astype(np.int8),
        ws=rng.uniform(0.01, 0.02, 16).astype(np.float32),
        s=np.float32(0.1),
        z=np.uint8(128),
        b=rng.standard_normal(16).astype(np.float32),
    )
    nodes = [
        helper.make_node('QuantizeLinear', ['x', 's', 'z'], ['q']),
        helper.make_node('DequantizeLinear', ['q', 's', 'z'], ['d']),
        helper.make_node('DequantizeLinear', ['w', 'ws'], ['wd'], axis=0),
        helper.make_node('Transpose', ['wd'], ['wt'], perm=[1, 0]),
        helper.make_node('MatMul', ['d', 'wt'], ['m'], name='layer'),
        helper.make_node('Add', ['m', 'b'], ['a']),
        # a second call reads the same weight
        helper.make_node('MatMul', ['d', 'wt'], ['m2'], name='layer#1'),
        helper.make_node('Add', ['b', 'm2'], ['a2']),
        helper.make_node('Sub', ['a', 'a2'], ['difference']),
        helper.make_node('Relu', ['a'], ['y']),
    ]
    proto = helper.make_graph(
        nodes,
        'linear',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 20, 32])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 20, 16]) for name in ('y', 'difference')],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model, path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=['CPUExecutionProvider']
    )
    x = np.random.default_rng(1).standard_normal((1, 20, 32)).astype(np.float32) * 4
    import onnx

    return session.run(None, {'x': x}), [node.op_type for node in onnx.load(path).graph.node]


def test_linear_layers_of_tensors_compute_in_integers(graph, tmp_path):
    before, float_nodes = run(copy.deepcopy(graph), tmp_path / 'before.onnx')
    assert 'MatMulIntegerToFloat' not in float_nodes
    assert passes.integer_products(graph.graph) == 2
    passes.weight_zero_points(graph.graph)
    after, integer_nodes = run(graph, tmp_path / 'after.onnx')
    assert integer_nodes.count('MatMulIntegerToFloat') == 2 and not {'Gemm', 'MatMul'} & set(integer_nodes)
    for ours, theirs in zip(before, after, strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_a_product_of_two_tensors_stays_as_it_is(graph):
    (product, *_) = (node for node in graph.graph if node.op_type == 'MatMul')
    product.replace_input_with(1, graph.graph.inputs[0])
    assert passes.integer_products(graph.graph) == 1 and product.inputs[1] is graph.graph.inputs[0]


def test_two_clips_of_one_tensor_keep_their_constants(tmp_path):
    """onnxscript fuses clips and loses the bounds of the second one."""

    class Inverse(nn.Module):
        def forward(self, x):
            x = x.sigmoid().clamp(min=0, max=1)
            return torch.log(x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3)) + x.clamp(min=2e-3)

    program = torch.onnx.export(Inverse(), (torch.zeros(2, 3),), dynamo=True, verbose=False)
    own_constants(program.model.graph)
    known = {value.name for value in program.model.graph.inputs} | set(program.model.graph.initializers)
    for node in program.model.graph:
        assert {value.name for value in node.inputs if value is not None} <= known
        known |= {value.name for value in node.outputs}
