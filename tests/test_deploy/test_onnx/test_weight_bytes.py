"""Bytes of weights in an ONNX file, counted by hand."""

import numpy as np
import pytest

from mmdet_ptq.deploy.onnx.weight_bytes import weight_bytes

onnx = pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
FLOAT = onnx.TensorProto.FLOAT


@pytest.fixture
def size_of(tmp_path):
    """Writes a graph of some nodes and constants, and counts its weights."""

    def count(nodes, **constants):
        made = [
            entry if isinstance(entry, onnx.TensorProto) else onnx.numpy_helper.from_array(entry, name)
            for name, entry in constants.items()
        ]
        ends = [onnx.helper.make_tensor_value_info(name, FLOAT, None) for name in ('x', 'y')]
        nodes = [onnx.helper.make_node(kind, given, [out]) for kind, given, out in nodes]
        graph = onnx.helper.make_graph(nodes, 'graph', ends[:1], ends[1:], made)
        onnx.save(onnx.helper.make_model(graph), tmp_path / 'model.onnx')
        return weight_bytes(tmp_path / 'model.onnx')

    return count


def test_weights_and_biases_count_by_their_types(size_of):
    w, b = np.ones((4, 3, 2, 2), np.float32), np.ones(4, np.float32)
    assert size_of([('Conv', ['x', 'w', 'b'], 'y')], w=w, b=b) == 4 * 48 + 4 * 4
    assert size_of([('Gemm', ['x', 'w', 'b'], 'y')], w=w[:, :, 0, 0].astype(np.float16), b=b) == 2 * 12 + 4 * 4
    # what is left out is an empty name
    assert size_of([('ConvTranspose', ['x', 'w', ''], 'y')], w=w) == 4 * 48


def test_codes_count_with_their_scales_and_tables(size_of):
    nodes = [('Gather', ['table', 'codes'], 'levels'), ('Mul', ['levels', 'scale'], 'w'), ('Conv', ['x', 'w'], 'y')]
    constants = dict(table=np.ones(16, np.int8), codes=np.ones((4, 9), np.uint8), scale=np.ones((4, 1), np.float32))
    assert size_of(nodes, **constants) == 16 + 36 + 4 * 4


def test_two_codes_of_four_bits_share_a_byte(size_of):
    for kind in ('INT4', 'UINT4'):
        codes = onnx.helper.make_tensor('codes', onnx.TensorProto.DataType.Value(kind), [3, 3], [1] * 9)
        nodes = [('DequantizeLinear', ['codes', 'scale'], 'w'), ('Conv', ['x', 'w'], 'y')]
        assert size_of(nodes, codes=codes, scale=np.float32(1)) == 5 + 4


def test_what_layers_share_counts_once_and_what_is_no_weight_not_at_all(size_of):
    nodes = [
        ('Mul', ['x', 'scale'], 'a'),  # an input's scale
        ('Conv', ['a', 'w', 'b'], 'c'),
        ('Conv', ['c', 'w', 'b'], 'd'),
        ('Reshape', ['d', 'shape'], 'e'),
        ('MatMul', ['e', 'f'], 'y'),
        ('Mul', ['x', 'm'], 'f'),  # a product of activations
    ]
    constants = dict(scale=np.ones(100, np.float32), w=np.ones((3, 3), np.float32), b=np.ones(3, np.float32))
    assert size_of(nodes, **constants, shape=np.ones(4), m=np.ones(7), unused=np.ones(9)) == 4 * 9 + 4 * 3
