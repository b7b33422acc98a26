"""Operations in the form that ONNX Runtime has integer kernels for, and what those compute."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch

onnxruntime = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
ir = pytest.importorskip('onnx_ir', reason="needs pip install 'mmdet-ptq[onnxruntime]'")

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from mmdet_ptq.deploy.integers import kernels  # noqa: E402
from mmdet_ptq.deploy.onnx.graph import add_constant  # noqa: E402
from mmdet_ptq.deploy.onnxruntime.integer_forms import add_to_clip, average_images, norms_by_channel, products_by_pixel  # noqa: E402
from mmdet_ptq.quantizers import AffineQuantizer  # noqa: E402

X86 = platform.machine().lower() in ('x86_64', 'amd64')
SHAPE = (1, 4, 16, 16)


def uniform(scale, zero=0):
    quantizer = AffineQuantizer(8)
    quantizer.scale.data.fill_(float(scale))
    quantizer.zero_point.fill_(int(zero))
    return quantizer


GATE = uniform(1 / 255)


def model_from(nodes, constants, out, out_shape=None, out_type=TensorProto.FLOAT):
    """A model that reads bytes."""
    graph = helper.make_graph(
        nodes,
        'graph',
        [helper.make_tensor_value_info('codes', TensorProto.UINT8, SHAPE)],
        [helper.make_tensor_value_info(out, out_type, out_shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def model_of(operation, source, target, out_shape=SHAPE, **attributes):
    """An operation between two quantizers: bytes in, bytes out."""
    constants = {}
    for name, quantizer in (('in', source), ('out', target)):
        constants |= {f's_{name}': quantizer.scale.detach().numpy(), f'z_{name}': np.uint8(quantizer.zero_point)}
    if operation == 'ReduceMean':
        constants['axes'] = np.array(attributes.pop('axes'), np.int64)
    nodes = [
        helper.make_node('DequantizeLinear', ['codes', 's_in', 'z_in'], ['x']),
        helper.make_node(operation, ['x', *(['axes'] if 'axes' in constants else [])], ['y'], 'it', **attributes),
        helper.make_node('QuantizeLinear', ['y', 's_out', 'z_out'], ['found']),
    ]
    return model_from(nodes, constants, 'found', out_shape, TensorProto.UINT8)


def run(model, codes, folder):
    """What the runtime gives, and the operations that it computed with their names."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / 'optimized.onnx'), 3
    serialized = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, options, providers=['CPUExecutionProvider'])
    found = session.run(None, {'codes': codes.numpy().astype(np.uint8)})[0]
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    # bytes are subtracted from each other
    return found.astype(int) if found.dtype == np.uint8 else found, [(node.op_type, node.name) for node in nodes]


def random_codes(seed):
    return torch.randint(0, 256, SHAPE, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def test_a_hard_sigmoid_is_a_sum_of_integers(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(20):
        source, codes = uniform(rng.uniform(0.01, 0.2), rng.integers(0, 256)), random_codes(seed)
        model = model_of('HardSigmoid', source, GATE, alpha=1 / 6)
        before, _ = run(model, codes, tmp_path)
        assert add_to_clip(model.graph) == 1
        after, operations = run(model, codes, tmp_path)
        assert [kind for kind, _ in operations] == ['QLinearAdd']
        # on a boundary between two codes the last digit decides
        assert np.abs(before - after).max() <= 1 and (before == after).mean() > 0.99
        simulated = GATE.encode(kernels.HardSigmoid(codes, source).value(GATE)).numpy()
        assert (simulated == after).mean() >= (1 if X86 else 0.999)


def test_a_mean_of_images_is_a_sum_of_integers(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(20):
        source, codes = uniform(rng.uniform(0.01, 0.2), rng.integers(0, 256)), random_codes(seed)
        target = uniform(source.scale.item() * rng.uniform(0.05, 0.3), rng.integers(0, 256))
        model = model_of('ReduceMean', source, target, (1, 4, 1, 1), axes=[-1, -2], keepdims=1)
        before, _ = run(model, codes, tmp_path)
        assert average_images(model.graph) == 1
        after, operations = run(model, codes, tmp_path)
        assert [kind for kind, _ in operations] == ['QLinearGlobalAveragePool']
        assert np.abs(before - after).max() <= 1
        simulated = target.encode(kernels.Average(codes, source).value(target)).numpy()
        assert (simulated == after).all()


@pytest.mark.parametrize(
    'change',
    [
        dict(operation='HardSigmoid', alpha=0.2),
        dict(operation='HardSigmoid', target=uniform(1 / 200), alpha=1 / 6),
        dict(operation='ReduceMean', axes=[1, 2], keepdims=1, out_shape=(1, 1, 1, 16)),
        dict(operation='ReduceMean', axes=[2, 3], keepdims=0, out_shape=(1, 4)),
    ],
    ids=['another factor', 'another end', 'over channels', 'another shape'],
)
def test_what_no_integer_kernel_computes_stays(change):
    model = model_of(**{'source': uniform(0.1, 100), 'target': GATE, **change})
    before = [node.op_type for node in model.graph]
    assert add_to_clip(model.graph) == average_images(model.graph) == 0
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize('between', ['DequantizeLinear', 'Mul', 'Relu'])
def test_a_normalisation_behind_integers_is_a_product_and_a_sum(between, tmp_path):
    rng = np.random.default_rng(0)
    constants = {name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in ('gamma', 'beta', 'mean', 'variance')}
    constants |= dict(s=np.float32(0.1), z=np.uint8(100), factor=np.full((4, 1, 1), 2, np.float32))
    nodes = [
        helper.make_node('DequantizeLinear', ['codes', 's', 'z'], ['x']),
        *([helper.make_node('Mul', ['x', 'factor'], ['read'])] if between == 'Mul' else []),
        *([helper.make_node('Relu', ['x'], ['read'])] if between == 'Relu' else []),
        helper.make_node(
            'BatchNormalization',
            ['x' if between == 'DequantizeLinear' else 'read', 'gamma', 'beta', 'mean', 'variance'],
            ['y'],
            'norm',
            epsilon=0.01,
        ),
    ]
    model, codes = model_from(nodes, constants, 'y', SHAPE), random_codes(0)
    serialized = ir.to_proto(model).SerializeToString()
    # what comes from floats may have the channels first
    assert norms_by_channel(model.graph) == (between != 'Relu')
    before, after = (
        onnxruntime.InferenceSession(proto, providers=['CPUExecutionProvider']).run(
            ['y'], {'codes': codes.numpy().astype(np.uint8)}
        )[0]
        for proto in (serialized, ir.to_proto(model).SerializeToString())
    )
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert ('BatchNormalization' in [node.op_type for node in model.graph]) == (between == 'Relu')


def pointwise(source, bias=True, kernel=1, behind=None, outputs=6, **attributes):
    """A quantized convolution of bytes that ends in float, with an int32 bias as export rounds it."""
    rng = np.random.default_rng(0)
    weight_scale = rng.uniform(0.001, 0.02, outputs).astype(np.float32)
    step = weight_scale * source.scale.detach().numpy()
    constants = dict(
        s=source.scale.detach().numpy(),
        z=np.uint8(source.zero_point),
        w=rng.integers(-63, 64, (outputs, 4 // attributes.get('group', 1), kernel, kernel)).astype(np.int8),
        ws=weight_scale,
    )
    nodes = [
        helper.make_node('DequantizeLinear', ['codes', 's', 'z'], ['x']),
        helper.make_node('DequantizeLinear', ['w', 'ws'], ['weight'], axis=0),
    ]
    if bias:
        constants |= dict(b=rng.integers(-5000, 5000, outputs).astype(np.int32), bs=step)
        nodes.append(helper.make_node('DequantizeLinear', ['b', 'bs'], ['bias'], axis=0))
    inputs = ['x', 'weight', *(['bias'] if bias else [])]
    last = 'found' if behind is None else 'y'
    nodes.append(helper.make_node('Conv', inputs, [last], 'layer', kernel_shape=[kernel] * 2, **attributes))
    nodes += behind or []
    return model_from(nodes, constants, 'found'), constants


@pytest.mark.parametrize('bias', [True, False])
def test_a_pointwise_convolution_that_ends_in_float_is_a_product_of_integers(tmp_path, bias):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        source, codes = uniform(rng.uniform(0.01, 0.2), rng.integers(0, 256)), random_codes(seed)
        model, numbers = pointwise(source, bias)
        before, operations = run(model, codes, tmp_path)
        assert 'Conv' in dict(operations)  # in float
        assert products_by_pixel(model.graph) == 1
        after, operations = run(model, codes, tmp_path)
        assert ('QGemm', 'layer') in [(kind, name[:5]) for kind, name in operations] and 'Conv' not in dict(operations)
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
        # exactly what is simulated: the sum of integers and the bias, times one factor
        total = np.einsum('nchw,oc->nohw', codes.numpy() - int(numbers['z']), numbers['w'][:, :, 0, 0].astype(int))
        if bias:
            total += numbers['b'].reshape(-1, 1, 1)
        expected = total.astype(np.float32) * (numbers['s'] * numbers['ws']).reshape(-1, 1, 1)
        np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize('bias', [True, False])
def test_images_of_every_size_are_rows_of_pixels(tmp_path, bias):
    source, codes = uniform(0.1, 3), random_codes(0)
    model, _ = pointwise(source, bias)
    fixed = pointwise(source, bias)[0]
    last = model.graph.node('layer').outputs[0]
    for value in (model.graph.inputs[0], last):
        value.shape = ir.Shape(['images', value.shape[1], 'height', 'width'])
    assert products_by_pixel(model.graph) == products_by_pixel(fixed.graph) == 1
    for part in (codes, codes[:1], codes[..., 1:, 1:]):
        found, operations = run(model, part, tmp_path)
        assert any(kind == 'QGemm' for kind, _ in operations)
        expected, _ = run(fixed, codes, tmp_path)
        top, left = (whole - size for whole, size in zip(codes.shape[2:], part.shape[2:], strict=True))
        np.testing.assert_array_equal(found, expected[: len(part), :, top:, left:])


def test_a_bias_in_float_is_added_behind_the_product(tmp_path):
    source, codes = uniform(0.1, 3), random_codes(0)
    model, numbers = pointwise(source, True)
    bias = np.linspace(-1, 1, len(numbers['b'])).astype(np.float32)
    model.graph.node('layer').replace_input_with(2, add_constant(model.graph, 'float_bias', bias))
    before, _ = run(model, codes, tmp_path)
    assert products_by_pixel(model.graph) == 1
    after, operations = run(model, codes, tmp_path)
    assert ('MatMulIntegerToFloat', 'layer') in operations
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_other_convolutions_stay_what_they_are():
    source = uniform(0.1, 3)
    quantized = [
        helper.make_node('Relu', ['y'], ['positive']),
        helper.make_node('QuantizeLinear', ['positive', 's', 'z'], ['q']),
        helper.make_node('DequantizeLinear', ['q', 's', 'z'], ['found']),
    ]
    for model, _ in (
        pointwise(source, kernel=3),
        pointwise(source, strides=[2, 2]),
        pointwise(source, pads=[1, 1, 1, 1]),
        pointwise(source, group=2),
        pointwise(source, behind=quantized),
    ):
        assert products_by_pixel(model.graph) == 0
    assert products_by_pixel(pointwise(source, behind=[helper.make_node('Relu', ['y'], ['found'])])[0].graph) == 1
