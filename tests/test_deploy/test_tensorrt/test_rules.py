"""TensorRT's rules on the smallest graphs: which axis holds the output channels, and which formats need no rule."""

import numpy as np
import pytest

from mmdet_ptq.deploy.tensorrt.rules import check_tensorrt_formats, check_tensorrt_model, check_tensorrt_rules
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping import LayerStructure, Structure
from mmdet_ptq.wrapping.structure import ActivationStructure

onnx = pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
FLOAT = onnx.TensorProto.FLOAT


def model(nodes, **constants):
    made = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    ends = [onnx.helper.make_tensor_value_info(name, FLOAT, None) for name in ('x', 'y')]
    nodes = [onnx.helper.make_node(kind, given, [out], out, **options) for kind, given, out, options in nodes]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, 'graph', ends[:1], ends[1:], made))


def weighted(reader, shape, scales, axis=None, **options):
    """A layer whose weight is dequantized with some scales."""
    nodes = [
        ('DequantizeLinear', ['codes', 'scale'], 'w', {} if axis is None else dict(axis=axis)),
        (reader, ['x', 'w'], 'y', options),
    ]
    return model(nodes, codes=np.ones(shape, np.int8), scale=np.ones(scales, np.float32))


@pytest.mark.parametrize(
    ('made', 'wrong'),
    [
        (weighted('Conv', (4, 3, 1, 1), 4, 0), None),
        (weighted('Conv', (4, 3, 1, 1), 4, -4), None),
        (weighted('Conv', (4, 3, 1, 1), 3, 1), 'along axis 1'),
        (weighted('Conv', (4, 3, 1, 1), 3, 0), 'along axis 0'),  # as many as it has no channels
        (weighted('ConvTranspose', (4, 3, 1, 1), 3), None),  # where nothing is said it is the second
        (weighted('ConvTranspose', (4, 3, 1, 1), 4, 0), 'along axis 0'),
        (weighted('Gemm', (4, 3), 3, 1), None),
        (weighted('Gemm', (4, 3), 4, 0), 'along axis 0'),
        (weighted('Gemm', (4, 3), 4, 0, transB=1), None),
        (weighted('MatMul', (4, 3), 3, 1), None),
        (weighted('MatMul', (2, 4, 3), 3, -1), None),
        (weighted('MatMul', (4, 3), 4, 0), 'along axis 0'),
        (weighted('Add', (4, 3), 4, 0), 'along axis 0'),  # which has no output channels
        (weighted('Add', (4, 3), ()), None),  # one scale lies on no axis
    ],
)
def test_scales_of_a_weight_lie_on_its_readers_output_channels(made, wrong):
    if wrong is None:
        check_tensorrt_model(made)
        return
    with pytest.raises(PTQError, match=rf"the node 'w' \(DequantizeLinear\): .* per output channel, this one {wrong}"):
        check_tensorrt_model(made)


def test_every_reader_of_a_weight_must_agree():
    made = weighted('Gemm', (4, 4), 4, 1)
    check_tensorrt_model(made)
    made.graph.node.append(onnx.helper.make_node('Gemm', ['x', 'w'], ['z'], transB=1))
    with pytest.raises(PTQError, match='along axis 1'):
        check_tensorrt_model(made)


def test_the_first_broken_rule_is_told_with_a_node_that_has_a_name_or_none(tmp_path):
    made = model([('Relu', ['x'], 'a', {}), ('Unique', ['a'], 'b', {}), ('Det', ['b'], 'y', {})])
    made.graph.node[1].name = ''
    onnx.save(made, tmp_path / 'model.onnx')
    with pytest.raises(PTQError, match=r"^TensorRT cannot take the node 'b' \(Unique\): its ONNX parser"):
        check_tensorrt_rules(tmp_path / 'model.onnx')


@pytest.mark.parametrize('dtype', [np.float32, np.float16, np.int64, np.int32, np.bool_])
def test_constants_of_what_tensorrt_computes_are_taken(dtype):
    check_tensorrt_model(model([('Add', ['x', 'c'], 'y', {})], c=np.ones(3, dtype)))


@pytest.mark.parametrize('dtype', [np.float64, np.uint8, np.int16])
def test_constants_of_other_types_are_told(dtype):
    with pytest.raises(
        PTQError, match=f'its constant c is of type {np.dtype(dtype).name.upper().replace("FLOAT64", "DOUBLE")}'
    ):
        check_tensorrt_model(model([('Add', ['x', 'c'], 'y', {})], c=np.ones(3, dtype)))


def test_zero_points_of_weights_with_few_bits_fit_an_int8():
    def structure(**spec):
        weight = dict(type='mmdet_ptq.AffineQuantizer', symmetric=False, **spec)
        activation = ActivationStructure(dict(type='mmdet_ptq.AffineQuantizer', bits=4, symmetric=True), 1)
        return Structure(
            layers=[LayerStructure('conv', 'convolution', 'neck', 1, 1, weight)], activations={'x': activation}
        )

    for bits in (2, 4, 7):
        check_tensorrt_formats(structure(bits=bits))
    with pytest.raises(PTQError, match='the weight of conv is quantized with a zero point'):
        check_tensorrt_formats(structure(bits=8))
    check_tensorrt_formats(Structure(layers=[LayerStructure('conv', 'convolution', 'neck', 1, 1)]))
