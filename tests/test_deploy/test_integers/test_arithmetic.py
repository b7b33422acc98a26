import copy
import platform
from contextlib import nullcontext

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mmdet_ptq.deploy import export_onnx, integer_arithmetic, integer_weight, open_model, settle_biases
from mmdet_ptq.deploy.integers import kernels as module
from mmdet_ptq.deploy.integers.biases import SharedBias
from mmdet_ptq.deploy.integers.kernels import SIGNED_ZERO
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes, recorded_codes
from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.testing import raw_outputs, tiny_batch, tiny_quantized
from mmdet_ptq.wrapping import float_weight, freeze_weights, quantized_weights

ort = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
SHAPE = (1, 3, 64, 64)
X86 = platform.machine().lower() in ('x86_64', 'amd64')
CASES = {  # scales per channel before depthwise convolutions; biases shared by levels, additions, resizing; zero points
    # per channel, products with sigmoids
    f'{kind}-{dataflow}': (kind, dict(preset='w8a8_observe', activations=MIN_MAX, dataflow=dataflow))
    for kind, dataflow in (('ssd', 'per_channel'), ('retinanet', 'full'), ('yolox', 'full'))
}
SYMMETRIC = dict(MIN_MAX, quantizer=dict(symmetric=True, narrow_range=True))
# signed codes do not end where a ReLU does
CASES |= {
    f'{kind}-{dataflow}-symmetric': (kind, dict(ptq, activations=SYMMETRIC))
    for kind, dataflow, ptq in ((kind, ptq['dataflow'], ptq) for kind, ptq in list(CASES.values())[:2])
}


def image(detector, seed=3):
    return detector.data_preprocessor(tiny_batch(1, seed=seed), False)['inputs']


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(case, id=name, marks=() if name == 'retinanet-full' else pytest.mark.thorough)
        for name, case in CASES.items()
    ],
)
def exported(request, tmp_path_factory):
    detector, structure = tiny_quantized(*request.param)
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    export_onnx(detector, path, SHAPE)
    return detector, structure, path


# one kind of detector is enough where its formats do not matter
one_kind = pytest.mark.parametrize('exported', [CASES['retinanet-full']], ids=['retinanet'], indirect=True)


def counted(monkeypatch):
    """How many tensors were computed as kernels do, by kind."""
    found, value = {}, module.Result.value

    def count(self, output):
        result = value(self, output)
        key = type(self).__name__ if result is not None else 'float'
        found[key] = found.get(key, 0) + 1
        return result

    monkeypatch.setattr(module.Result, 'value', count)
    return found


def test_a_whole_pass_gives_the_runtimes_codes(exported, monkeypatch):
    detector, structure, path = exported
    kernels = counted(monkeypatch)
    for seed in (3, 4):
        found = compare_codes(detector, path, image(detector, seed), exact=True)
        assert {entry.name.split('@')[0] for entry in found} == set(structure.activations)
        assert all(entry.identical == 1 for entry in found), found
    outputs = sum(len(layer.outputs) or len(layer.inputs) for layer in structure.layers)
    # pointwise layers of the heads are matrix products, which end in float
    products = sum(node.op_type == 'Gemm' for node in onnx.load(path).graph.node)
    assert kernels['ConvolutionSum'] + kernels.get('GemmSum', 0) == 2 * (outputs - products)
    assert open_model(path).coverage().float == []
    # MobileNetV2's shortcuts; ResNet's, and the pyramid's; a product whose channels get scales of their own is float
    assert kernels.get('Sum', 0) + kernels.get('Product', 0) > 2
    assert kernels.get('Product', 0) == 0 or kernels['Product'] > kernels.get('float', 0)
    assert 'float' not in kernels or 'Product' in kernels


@pytest.mark.thorough
@one_kind
def test_a_wrong_bias_is_seen(exported):
    detector, structure, path = exported
    layer = next(layer for layer in structure.layers if layer.outputs and layer.outputs[0])
    wrong = copy.deepcopy(detector)
    scale = wrong.ptq.activations[layer.outputs[0]].positive_scale().detach().reshape(-1)[0]
    with torch.no_grad():
        wrong.get_submodule(layer.name).bias[0] += scale
    found = {entry.name: entry for entry in compare_codes(wrong, path, image(wrong), exact=True)}
    channels = len(wrong.get_submodule(layer.name).bias)
    assert 1 - 1.01 / channels <= found[layer.outputs[0]].identical < 1 - 0.5 / channels


@one_kind
def test_a_wrong_scale_of_a_sum_is_seen(exported, monkeypatch):
    detector, _, path = exported
    levels = module.Sum.levels

    def halved(self, output):
        return levels(module.Sum(self.a, self.b, (self.quantizers[1], self.quantizers[1])), output)

    monkeypatch.setattr(module.Sum, 'levels', halved)
    assert min(entry.identical for entry in compare_codes(detector, path, image(detector), exact=True)) < 0.9


@one_kind
@torch.no_grad()
def test_a_convolution_is_an_integer_sum_times_one_factor(exported):
    detector, structure, _ = exported
    layer = next(
        layer
        for layer in structure.layers
        if layer.outputs
        and layer.outputs[0]
        and not any(detector.ptq.activations[name].num_channels for name in (layer.inputs[0], layer.outputs[0]))
    )
    conv, quantized = detector.get_submodule(layer.name), quantized_weights(detector)[layer.name]
    source, target = (detector.ptq.activations[name] for name in (layer.inputs[0], layer.outputs[0]))
    seen = []
    handle = conv.register_forward_hook(lambda _, args, output: seen.append(source.encode(args[0])))
    with integer_arithmetic(detector), recorded_codes(detector, {}) as codes:
        detector(image(detector), None, mode='tensor')
    handle.remove()
    x = seen[0] - source.zero_point
    weight = integer_weight(quantized.quantizer, quantized.codes(float_weight(conv)))
    step = (source.positive_scale() * weight.scale).numpy()
    columns = torch.nn.functional.unfold(x.double(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    total = np.einsum('ck,nkl->ncl', weight.integers().numpy().astype(np.int64), columns.numpy().astype(np.int64))
    total += np.rint(conv.bias.numpy() / step.astype(np.float64)).astype(np.int64).reshape(-1, 1)
    scaled = total.astype(np.float32) * (step / target.positive_scale().numpy()).reshape(-1, 1)
    wanted = np.clip(np.rint(scaled) + int(target.zero_point), *target.code_range)
    np.testing.assert_array_equal(codes[layer.outputs[0]].flatten(2).numpy(), wanted)


def runtime_model(operation, quantizers, *codes):
    """A function of codes between its quantizers: theirs as ONNX Runtime writes them."""

    def written(values, quantizer):
        return (values + SIGNED_ZERO * quantizer.symmetric).numpy().astype(np.uint8)

    pairs = [
        [
            numpy_helper.from_array(q.scale.detach().numpy(), f's{i}'),
            numpy_helper.from_array(written(q.zero_point, q), f'z{i}'),
        ]
        for i, q in enumerate(quantizers)
    ]
    nodes = [helper.make_node('DequantizeLinear', [f'a{i}', f's{i}', f'z{i}'], [f'x{i}']) for i in range(len(codes))]
    last = len(codes)
    nodes += [
        helper.make_node(operation, [f'x{i}' for i in range(last)], ['float']),
        helper.make_node('QuantizeLinear', ['float', f's{last}', f'z{last}'], ['c']),
    ]
    infos = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, codes[0].shape)
        for name in (*[f'a{i}' for i in range(last)], 'c')
    ]
    graph = helper.make_graph(nodes, operation, infos[:-1], infos[-1:], sum(pairs, []))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    found = session.run(
        None, {f'a{i}': written(part, q) for i, (part, q) in enumerate(zip(codes, quantizers, strict=False))}
    )[0]
    return found.astype(int) - SIGNED_ZERO * quantizers[-1].symmetric


def uniform(symmetric, scale, rng, zero=None):
    quantizer = AffineQuantizer(8, symmetric=symmetric)
    quantizer.scale.data.fill_(float(scale))
    quantizer.zero_point.fill_(0 if symmetric else int(rng.integers(0, 256)) if zero is None else zero)
    return quantizer


@pytest.mark.parametrize('operation', ['Add', 'Mul'])
@pytest.mark.parametrize('symmetric', [(False, False, False), (True, True, True), (True, False, True)])
def test_two_tensors_are_combined_as_the_runtime_does(operation, symmetric):
    rng = np.random.default_rng(0)
    for ties in (True, False):
        quantizers = [
            uniform(signed, rng.integers(1, 64) / 1024 if ties else rng.uniform(0.02, 0.05), rng)
            for signed in symmetric
        ]
        a, b = (
            grid.reshape(1, -1)
            for grid in torch.meshgrid(
                *(torch.arange(q.code_range[0], q.code_range[1] + 1, dtype=torch.int32) for q in quantizers[:2]),
                indexing='ij',
            )
        )
        result = (module.Sum if operation == 'Add' else module.Product)(a, b, tuple(quantizers[:2]))
        found = quantizers[2].encode(result.value(quantizers[2])).numpy()
        # kernels of other processors add in another order
        assert (found == runtime_model(operation, quantizers, a, b)).mean() >= (1 if X86 else 0.999)


@pytest.mark.parametrize('symmetric', [False, True])
def test_a_sigmoid_is_the_runtimes_table(symmetric):
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(40):
        source = uniform(symmetric, rng.uniform(0.01, 0.2), rng)
        output = uniform(symmetric, 1 / (127 if symmetric else 255), rng, zero=0)
        codes = torch.arange(source.code_range[0], source.code_range[1] + 1, dtype=torch.int32)
        found = output.encode(module.by_table(module.sigmoid, source.decode(codes), source)).numpy()
        wrong += int((found != runtime_model('Sigmoid', (source, output), codes)).sum())
    assert wrong <= (0 if X86 else 10)


def test_silu_in_float_is_the_runtimes():
    quantizer = AffineQuantizer(8, num_channels=3, channel_axis=1)
    quantizer.scale.data.copy_(torch.tensor([0.02, 0.05, 0.2]))
    quantizer.zero_point.copy_(torch.tensor([0, 100, 200]))
    x = quantizer.decode(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.int32))
    nodes = [helper.make_node('Sigmoid', ['x'], ['gate']), helper.make_node('Mul', ['x', 'gate'], ['y'])]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in 'xy']
    model = helper.make_model(
        helper.make_graph(nodes, 'silu', infos[:1], infos[1:]),
        opset_imports=[helper.make_opsetid('', 21)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    wanted = torch.from_numpy(session.run(None, {'x': x.numpy()})[0])
    tolerance = dict(rtol=0, atol=0) if X86 else {}
    torch.testing.assert_close(module.silu(x), wanted, **tolerance)
    torch.testing.assert_close(module.by_table(module.silu, x, quantizer), wanted, **tolerance)


@pytest.mark.parametrize('end', [float('inf'), 6.0])
def test_a_relu_that_the_quantizer_does_not_repeat_clips_codes(end):
    quantizer = AffineQuantizer(8, symmetric=True)
    quantizer.scale.data.fill_(0.06)
    codes = torch.arange(-128, 128, dtype=torch.int32)
    result = module.Sum(codes, torch.zeros_like(codes), (quantizer, quantizer), ends=[end])
    torch.testing.assert_close(result.value(quantizer), quantizer(quantizer.decode(codes).clamp(0, end)))
    # one code cannot clip channels of several scales
    channels = AffineQuantizer(8, symmetric=True, num_channels=2, channel_axis=1)
    channels.scale.data.copy_(torch.tensor([0.06, 0.07]))
    assert (module.Result(ends=[end])._clips(channels) is None) == (end == 6)


@one_kind
def test_what_a_layer_computes_from_its_weight_stays_simulated(exported, monkeypatch):
    detector, structure, _ = exported
    detector = copy.deepcopy(detector)
    layer = detector.get_submodule(next(layer.name for layer in structure.layers if layer.outputs))
    kind = type(layer)
    # as switchable atrous convolutions do
    monkeypatch.setattr(
        kind,
        '_conv_forward',
        lambda self, x, weight, bias: torch.nn.functional.conv2d(
            x, weight * (2 if self is layer else 1), bias, self.stride, self.padding, self.dilation, self.groups
        ),
    )
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    for arithmetic in (nullcontext(), integer_arithmetic(detector)):
        with torch.no_grad(), arithmetic:
            detector(image(detector), None, mode='tensor')
    torch.testing.assert_close(*seen)


@one_kind
def test_afterwards_the_detector_is_simulated_as_before(exported):
    detector, _, _ = exported
    before = raw_outputs(detector)
    hooks = [len(m._forward_hooks) for m in detector.modules()]
    with pytest.raises(KeyboardInterrupt), integer_arithmetic(detector):
        raise KeyboardInterrupt
    assert [len(m._forward_hooks) for m in detector.modules()] == hooks
    assert not {'run', 'write', 'gate', 'product'} & set(vars(detector.ptq.flow))
    assert 'quantize' not in vars(detector.ptq)
    assert all(hook.enabled for hook in detector.ptq.hooks if isinstance(hook, SharedBias))
    for first, second in zip(before, raw_outputs(detector), strict=True):
        assert torch.equal(first, second)
