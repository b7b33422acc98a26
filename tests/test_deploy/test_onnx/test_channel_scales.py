"""Scales per channel move into the layers around them, and what is computed stays, by ONNX's own reference."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
ir = pytest.importorskip('onnx_ir', reason="needs pip install 'mmdet-ptq[onnxruntime]'")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from mmdet_ptq.deploy.onnx.channel_scales import (  # noqa: E402
    absorb_channel_scales,
    by_channel,
    divide_before_quantizing,
    fold_affine,
)

CHANNELS = 4
SHAPE = [2, CHANNELS, 5, 6]
RNG = np.random.default_rng(0)
SCALES = np.float32([0.02, 0.05, 0.03, 0.01])
CONSTANTS = dict(
    w=RNG.integers(-127, 128, (CHANNELS, CHANNELS, 1, 1)).astype(np.int8),
    depth=RNG.integers(-127, 128, (CHANNELS, 1, 3, 3)).astype(np.int8),
    ws=RNG.uniform(0.001, 0.005, CHANNELS).astype(np.float32),
    bias=RNG.standard_normal(CHANNELS).astype(np.float32),
    s=SCALES,
    z=np.full(CHANNELS, 100, np.uint8),
    factor=np.float32([0.5, 2, 4, 0.25]).reshape(-1, 1, 1),
)
CONV = [
    helper.make_node('DequantizeLinear', ['w', 'ws'], ['wd'], axis=0),
    helper.make_node('Conv', ['x', 'wd', 'bias'], ['c'], 'conv'),
]
DEPTHWISE = [
    helper.make_node('DequantizeLinear', ['depth', 'ws'], ['dd'], axis=0),
    helper.make_node('Conv', ['d', 'dd', 'bias'], ['y'], 'depthwise', group=CHANNELS, pads=[1, 1, 1, 1]),
]


def pair(source, codes='q', value='d', clip=False):
    """A quantizer with a scale per channel."""
    nodes = [helper.make_node('QuantizeLinear', [source, 's', 'z'], [codes], codes, axis=1)]
    if clip:
        nodes.append(helper.make_node('Clip', [codes, 'low', 'high'], [f'{codes}_clip']))
        codes = f'{codes}_clip'
    return [*nodes, helper.make_node('DequantizeLinear', [codes, 's', 'z'], [value], value, axis=1)]


def model_of(nodes, outputs=('y',), **constants):
    used = {name for node in nodes for name in node.input}
    given = {name: value for name, value in {**CONSTANTS, **constants}.items() if name in used}
    graph = helper.make_graph(
        nodes,
        'graph',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in given.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


X = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


def results(model):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return ReferenceEvaluator(proto).run(None, {'x': X})


def kinds(model):
    return [node.op_type for node in model.graph]


def scales(model, kind):
    """Shapes of the scales of quantizers of activations."""
    nodes = [node for node in model.graph if node.op_type == kind and node.inputs[0].const_value is None]
    return [tuple(node.inputs[1].shape) for node in nodes], [node.attributes.get('axis') for node in nodes]


def changed(nodes, change=absorb_channel_scales, outputs=('y',), **constants):
    """A model before and after, whose outputs must be the same but for codes on a boundary."""
    model = model_of(nodes, outputs, **constants)
    before = results(model)
    told = change(model.graph)
    for ours, theirs in zip(results(model), before, strict=True):
        same = np.isclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert same.mean() > 0.99 and theirs.std() > 0.01
    return model, told


def per_tensor(model):
    for kind in ('QuantizeLinear', 'DequantizeLinear'):
        shapes, axes = scales(model, kind)
        assert shapes and set(shapes) == {()} and set(axes) == {None}


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('relu', [False, True])
def test_between_a_convolution_and_a_depthwise_one_scales_cost_nothing(relu, clip):
    between = [helper.make_node('Relu', ['c'], ['r'])] if relu else []
    nodes = [*CONV, *between, *pair('r' if relu else 'c', clip=clip), *DEPTHWISE]
    before = len(model_of(nodes, low=np.uint8(20), high=np.uint8(200)).graph)
    model, _ = changed(nodes, low=np.uint8(20), high=np.uint8(200))
    assert len(model.graph) == before
    per_tensor(model)


def test_a_relu6_whose_end_the_quantizer_repeats_is_a_relu():
    ends = dict(zero=np.float32(0), six=np.float32(6))
    clip = helper.make_node('Clip', ['c', 'zero', 'six'], ['r'])
    nodes = [*CONV, clip, *pair('r'), *DEPTHWISE]
    model, _ = changed(nodes, z=np.zeros(CHANNELS, np.uint8), s=SCALES / SCALES.max() * np.float32(6 / 255), **ends)
    assert 'Clip' not in kinds(model) and 'Relu' in kinds(model) and 'Div' not in kinds(model)
    # where a code is above 6 it stays, and what it ends is divided
    model, _ = changed(nodes, z=np.zeros(CHANNELS, np.uint8), s=np.full(CHANNELS, 0.1, np.float32), **ends)
    assert 'Clip' in kinds(model) and 'Div' in kinds(model)
    per_tensor(model)


def test_other_readers_get_the_tensor_multiplied():
    reader = helper.make_node('Add', ['d', 'x'], ['y'])
    model, _ = changed([*CONV, *pair('c'), reader])
    assert kinds(model).count('Mul') == 1 and 'Div' not in kinds(model)
    per_tensor(model)
    # of both kinds of readers none takes the scales
    model, _ = changed([*CONV, *pair('c'), *DEPTHWISE, helper.make_node('Add', ['d', 'y'], ['z_'])], outputs=['z_'])
    assert kinds(model).count('Mul') == 1
    per_tensor(model)


def test_what_no_convolution_alone_writes_is_divided():
    for nodes in (
        [*pair('x'), *DEPTHWISE],
        [*CONV, helper.make_node('Sigmoid', ['c'], ['r']), *pair('r'), *DEPTHWISE],
        # the convolution has another reader
        [*CONV, *pair('c'), *DEPTHWISE, helper.make_node('Add', ['y', 'c'], ['z_'])],
    ):
        model, _ = changed(nodes, outputs=[nodes[-1].output[0]])
        assert kinds(model).count('Div') == 1
        per_tensor(model)


@pytest.mark.parametrize('outputs', [True, False])
def test_at_the_end_of_the_graph_scales_may_stay(outputs):
    model, _ = changed([*CONV, *pair('c', value='y')], lambda graph: absorb_channel_scales(graph, outputs))
    assert scales(model, 'DequantizeLinear')[0] == ([()] if outputs else [(CHANNELS,)])
    assert scales(model, 'QuantizeLinear')[0] == [()]
    assert ('Mul' in kinds(model)) == outputs


ZEROS = np.uint8([3, 100, 128, 255])


def test_depthwise_convolutions_of_several_zero_points_read_padded_values():
    relu = helper.make_node('Relu', ['x'], ['r'])
    model, _ = changed([relu, *pair('r'), *DEPTHWISE], z=ZEROS)
    assert kinds(model).count('Pad') == 1
    per_tensor(model)
    (conv,) = (node for node in model.graph if node.name == 'depthwise')
    assert conv.attributes['pads'].as_ints() == (0, 0, 0, 0)
    # without borders nothing is padded; without a bias one is made
    bare = helper.make_node('Conv', ['d', 'dd'], ['y'], 'depthwise', group=CHANNELS, pads=[0, 0, 0, 0])
    model, _ = changed([relu, *pair('r'), DEPTHWISE[0], bare], z=ZEROS)
    assert 'Pad' not in kinds(model)
    per_tensor(model)


def test_other_readers_of_several_zero_points_read_floats():
    for nodes in ([*CONV, *pair('c'), *DEPTHWISE], [*pair('x'), helper.make_node('Relu', ['d'], ['y'])]):
        model, _ = changed(nodes, z=ZEROS)
        assert 'Cast' in kinds(model) and scales(model, 'QuantizeLinear')[0] == [(CHANNELS,)]
        assert not scales(model, 'DequantizeLinear')[0]


def test_a_weight_with_another_reader_keeps_its_scales():
    second = helper.make_node('Conv', ['x', 'dd', 'bias'], ['other'], 'second', group=CHANNELS, pads=[1, 1, 1, 1])
    model, _ = changed([*CONV, *pair('c'), *DEPTHWISE, second], outputs=['y', 'other'])
    per_tensor(model)
    assert kinds(model).count('DequantizeLinear') == 4


def test_one_scale_for_all_stays():
    nodes = [
        helper.make_node('QuantizeLinear', ['x', 's', 'z'], ['q'], 'q'),
        helper.make_node('DequantizeLinear', ['q', 's', 'z'], ['d'], 'd'),
        *DEPTHWISE,
    ]
    model = model_of(nodes, s=np.float32(0.1), z=np.uint8(3))
    before = ir.to_proto(model).SerializeToString()
    absorb_channel_scales(model.graph)
    assert ir.to_proto(model).SerializeToString() == before


def behind(*nodes, bias=True, quantized=True):
    conv = helper.make_node('Conv', ['x', 'wd' if quantized else 'wf', *(['bias'] if bias else [])], ['c'], 'conv')
    return [CONV[0], conv, *nodes] if quantized else [conv, *nodes]


DIVISION = helper.make_node('Div', ['c', 'factor'], ['y'])
FLOAT = RNG.standard_normal((CHANNELS, CHANNELS, 1, 1)).astype(np.float32)


NORM = dict(
    gamma=np.float32([1, -2, 0.5, 3]),
    beta=np.float32([0, 1, 2, 3]),
    mean=np.float32([1, 2, -1, 0.5]),
    variance=np.float32([0.5, 1, 4, 2]),
)
AFFINE = dict(
    norm=helper.make_node('BatchNormalization', ['c', *NORM], ['y'], epsilon=0.01),
    factor=helper.make_node('Mul', ['c', 'factor'], ['y']),
    turned=helper.make_node('Mul', ['factor', 'c'], ['y']),
    summand=helper.make_node('Add', ['factor', 'c'], ['y']),
    divisor=DIVISION,
    negative=helper.make_node('Neg', ['c'], ['y']),
    less=helper.make_node('Sub', ['c', 'factor'], ['y']),
    rest=helper.make_node('Sub', ['factor', 'c'], ['y']),
)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kind', AFFINE)
@pytest.mark.parametrize(
    'number', [np.float32(-3), np.float32([1, -2, 3, -4]).reshape(1, -1, 1, 1)], ids=['one', 'each']
)
def test_what_is_affine_behind_a_convolution_is_folded(kind, number, bias):
    model, count = changed(behind(AFFINE[kind], bias=bias), fold_affine, **NORM, factor=number)
    assert count == 1 and kinds(model) == ['DequantizeLinear', 'Conv']
    # scales stay positive: codes change their sign
    (weight, _) = model.graph
    assert (weight.inputs[1].const_value.numpy() > 0).all() and weight.inputs[0].dtype == ir.DataType.INT8


def test_channels_that_count_for_nothing_have_codes_of_nothing():
    model, count = changed(behind(AFFINE['factor']), fold_affine, factor=np.float32([1, 0, -2, 3]).reshape(-1, 1, 1))
    (weight, _) = model.graph
    assert count == 1 and not weight.inputs[0].const_value.numpy()[1].any()
    assert (weight.inputs[1].const_value.numpy() > 0).all()


def test_factors_of_as_many_images_as_channels_stay():
    model = model_of(behind(DIVISION), factor=np.float32([1, 2, 3, 4]).reshape(4, 1, 1, 1))
    assert fold_affine(model.graph) == 0 and 'Div' in kinds(model)


def test_factors_behind_a_convolution_of_one_dimension_are_no_channels():
    nodes = behind(AFFINE['factor'])
    graph = helper.make_graph(
        nodes,
        'graph',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, CHANNELS, 5])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(value, name)
            for name, value in {**CONSTANTS, 'w': CONSTANTS['w'][..., 0]}.items()
            if name in ('w', 'ws', 'bias', 'factor')
        ],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10))
    assert fold_affine(model.graph) == 0 and 'Mul' in kinds(model)


def test_several_are_folded_one_after_the_other():
    nodes = behind(
        helper.make_node('Mul', ['c', 'factor'], ['m']),
        helper.make_node('Add', ['m', 'one'], ['a']),
        helper.make_node('BatchNormalization', ['a', *NORM], ['y']),
    )
    model, count = changed(nodes, fold_affine, one=np.float32(1), **NORM)
    assert count == 3 and kinds(model) == ['DequantizeLinear', 'Conv']


@pytest.mark.parametrize(
    'nodes, outputs, constants',
    [
        (behind(AFFINE['factor'], quantized=False), ['y'], dict(wf=FLOAT)),
        (behind(AFFINE['factor']), ['y', 'c'], {}),
        (behind(AFFINE['divisor']), ['y'], dict(factor=np.float32([1, 2, 3, 4, 5, 6]))),
        (behind(helper.make_node('Div', ['factor', 'c'], ['y'])), ['y'], {}),
        (behind(helper.make_node('Add', ['c', 'x'], ['y'])), ['y'], {}),
        # -128 has no negative
        (behind(AFFINE['factor']), ['y'], dict(factor=np.float32(-1), w=np.full_like(CONSTANTS['w'], -128))),
    ],
    ids=['float', 'another reader', 'by column', 'turned round', 'no constant', 'no sign'],
)
def test_what_a_weight_cannot_take_over_stays(nodes, outputs, constants):
    model, count = changed(nodes, fold_affine, outputs, **constants)
    assert count == 0 and nodes[-1].op_type in kinds(model)


def test_a_shared_weight_is_changed_for_one_call():
    other = helper.make_node('Conv', ['x', 'wd', 'bias'], ['other'], 'conv#1')
    model, count = changed(behind(AFFINE['factor'], other), fold_affine, ['y', 'other'], factor=np.float32(-2))
    assert count == 1 and kinds(model).count('DequantizeLinear') == 2


@pytest.mark.parametrize(
    'shape, expected', [((1, 4, 3, 7), (4, 1, 7)), ((1, 4, 3, None), (4, 1, 1)), ((9, 4), (4,)), ((1, 4, 5), (4, 1))]
)
def test_constants_of_channels_are_repeated_along_known_rows(shape, expected):
    model = model_of([helper.make_node('Relu', ['x'], ['y'])])
    (node,) = model.graph
    value = by_channel(model.graph, node, 'numbers', SCALES, ir.Shape(shape))
    model.graph.outputs[0] = value
    (found,) = results(model)
    assert found.shape == expected
    np.testing.assert_array_equal(found, np.broadcast_to(SCALES.reshape(4, *[1] * (len(expected) - 1)), expected))


def test_tensors_are_divided_before_they_are_quantized():
    symmetric = dict(z=np.zeros(CHANNELS, np.int8))
    model = model_of([*pair('x')[:1], helper.make_node('Cast', ['q'], ['y'], to=TensorProto.FLOAT)], **symmetric)
    before = results(model)
    divide_before_quantizing(model.graph)
    assert scales(model, 'QuantizeLinear') == ([()], [None]) and kinds(model) == ['Div', 'QuantizeLinear', 'Cast']
    np.testing.assert_array_equal(results(model)[0], before[0])
    # a second time there is nothing to do
    divide_before_quantizing(model.graph)
    assert kinds(model) == ['Div', 'QuantizeLinear', 'Cast']
