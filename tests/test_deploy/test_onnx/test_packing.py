import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdet_ptq.deploy.onnx.packing import narrow_biases, pack_weights

ort = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
CHANNELS, OUT, KERNEL = 6, 5, 3


def model(weight, bias, shared=False):
    """One or two convolutions in quantize / dequantize form; two share weight and bias."""
    constants = dict(
        scale=np.float32(0.1),
        zero=np.uint8(3),
        weight=weight,
        bias=bias,
        weight_scale=np.linspace(0.01, 0.02, OUT, dtype=np.float32),
    )
    constants['bias_scale'] = constants['weight_scale'] * constants['scale']
    nodes = [
        helper.make_node('QuantizeLinear', ['input', 'scale', 'zero'], ['codes']),
        helper.make_node('DequantizeLinear', ['codes', 'scale', 'zero'], ['x']),
        helper.make_node('DequantizeLinear', ['weight', 'weight_scale'], ['w'], axis=0),
        helper.make_node('DequantizeLinear', ['bias', 'bias_scale'], ['b'], axis=0),
    ]
    outputs = ['y', 'z'] if shared else ['y']
    nodes += [helper.make_node('Conv', ['x', 'w', 'b'], [name], name=name) for name in outputs]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size, None, None])
        for name, size in (('input', CHANNELS), *((name, OUT) for name in outputs))
    ]
    graph = helper.make_graph(
        nodes,
        'detector',
        values[:1],
        values[1:],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)


def answers(proto):
    x = np.random.default_rng(0).uniform(-0.3, 20, (1, CHANNELS, 8, 8)).astype(np.float32)
    return ort.InferenceSession(proto.SerializeToString(), providers=['CPUExecutionProvider']).run(None, {'input': x})


def changed(proto, change):
    """The model after a change, and what the change returned."""
    found = ir.from_proto(proto)
    result = change(found.graph)
    proto = ir.to_proto(found)
    onnx.checker.check_model(proto, full_check=True)
    used = {name for node in proto.graph.node for name in node.input}
    return proto, result, {entry.name: entry for entry in proto.graph.initializer if entry.name in used}


def weights(kind):
    rng, shape = np.random.default_rng(1), (OUT, CHANNELS, KERNEL, KERNEL)
    codes = rng.integers(0, 16, shape)
    if kind == 'one table':
        return np.array([-127, -95, -69, -49, -33, -21, -11, -3, 3, 11, 21, 33, 49, 69, 95, 127])[codes]
    if kind == 'a zero point per channel':
        return codes + np.array([0, 60, -100, 9, -15]).reshape(-1, 1, 1, 1)
    if kind == 'a table per channel':
        tables = np.stack([rng.permutation(256)[:16] - 128 for _ in range(OUT)])
        return np.take_along_axis(tables, codes.reshape(OUT, -1), 1).reshape(shape)
    return rng.integers(-128, 128, shape)


@pytest.mark.parametrize(
    'kind,bytes_per_channel',
    [('one table', 16 / OUT), ('a zero point per channel', 1), ('a table per channel', 16 + 4)],
)
def test_weights_of_sixteen_levels_take_half_a_byte(kind, bytes_per_channel):
    array = weights(kind).astype(np.int8)
    proto = model(array, np.arange(OUT, dtype=np.int32), shared=True)
    packed, count, constants = changed(proto, pack_weights)
    assert count == 1 and 'weight' not in constants
    sizes = {
        name: np.prod(entry.dims)
        * (0.5 if entry.data_type == TensorProto.UINT4 else helper.tensor_dtype_to_np_dtype(entry.data_type).itemsize)
        for name, entry in constants.items()
        if name.startswith('weight_') and name != 'weight_scale'
    }
    assert sum(sizes.values()) == array.size / 2 + OUT * bytes_per_channel
    for ours, theirs in zip(answers(proto), answers(packed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_other_weights_stay():
    proto = model(weights('many').astype(np.int8), np.arange(OUT, dtype=np.int32))
    packed, count, constants = changed(proto, pack_weights)
    assert count == 0 and constants['weight'].data_type == TensorProto.INT8


@pytest.mark.parametrize(
    'largest,narrow', [(32767, True), (-32768, True), (32768, False), (-32769, False), (-(2**31), False)]
)
def test_biases_take_two_bytes_where_these_hold_them(largest, narrow):
    bias = np.array([1, -2, largest, 4, 5], np.int32)
    proto = model(weights('many').astype(np.int8), bias, shared=True)
    narrowed, count, constants = changed(proto, narrow_biases)
    stored = next(entry for name, entry in constants.items() if name in ('bias', 'bias_narrow'))
    assert count == narrow and stored.data_type == (TensorProto.INT16 if narrow else TensorProto.INT32)
    np.testing.assert_array_equal(numpy_helper.to_array(stored), bias)
    for ours, theirs in zip(answers(proto), answers(narrowed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_reader_in_front_of_the_first_one_finds_its_weight():
    """Layers that levels share may have dequantizers of their own, in another order than they stand in the graph."""
    proto = model(weights('one table').astype(np.int8), np.arange(OUT, dtype=np.int32), shared=True)
    own = helper.make_node('DequantizeLinear', ['weight', 'weight_scale'], ['own'], axis=0)
    proto.graph.node[-1].input[1] = 'own'
    # the first convolution's dequantizer comes last
    nodes = [*proto.graph.node[:2], own, proto.graph.node[3], proto.graph.node[2], *proto.graph.node[4:]]
    proto.graph.ClearField('node')
    proto.graph.node.extend(nodes)
    packed, count, _ = changed(proto, pack_weights)
    assert count == 1
    for ours, theirs in zip(answers(proto), answers(packed), strict=True):
        np.testing.assert_array_equal(ours, theirs)
