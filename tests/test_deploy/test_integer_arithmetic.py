import copy
import platform

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mmdet_ptq.deploy import export_onnx, integer_weight, settle_biases
from mmdet_ptq.deploy import integer_results as module
from mmdet_ptq.deploy.compare import _recorded, compare_codes
from mmdet_ptq.deploy.integer_arithmetic import integer_arithmetic
from mmdet_ptq.deploy.integer_biases import SharedBias
from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.testing import raw_outputs, tiny_batch, tiny_quantized
from mmdet_ptq.wrapping import float_weight, freeze_weights, quantized_weights

ort = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
SHAPE = (1, 3, 64, 64)
CASES = {  # scales per channel before depthwise convolutions; biases shared by levels, additions, resizing; zero points
    # per channel, products with sigmoids
    f'{kind}-{dataflow}': (kind, dict(preset='w8a8_observe', activations=MIN_MAX, dataflow=dataflow))
    for kind, dataflow in (('ssd', 'per_channel'), ('retinanet', 'full'), ('yolox', 'full'))}


def image(detector, seed=3):
    return detector.data_preprocessor(tiny_batch(1, seed=seed), False)['inputs']


@pytest.fixture(scope='module', params=CASES.values(), ids=CASES)
def exported(request, tmp_path_factory):
    detector, structure = tiny_quantized(*request.param)
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    export_onnx(detector, path, SHAPE)
    return detector, structure, path


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
    assert kernels['ConvolutionSum'] == 2 * outputs
    # MobileNetV2's shortcuts; ResNet's, and the pyramid's; a product whose channels get scales of their own is float
    assert kernels.get('Sum', 0) + kernels.get('Product', 0) > 2
    assert kernels.get('Product', 0) == 0 or kernels['Sigmoid'] >= kernels['Product'] > kernels.get('float', 0)
    assert 'float' not in kernels or 'Product' in kernels


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


def test_a_wrong_scale_of_a_sum_is_seen(exported, monkeypatch):
    detector, _, path = exported
    levels = module.Sum.levels

    def halved(self, output):
        return levels(module.Sum(self.a, self.b, (self.quantizers[1], self.quantizers[1])), output)

    monkeypatch.setattr(module.Sum, 'levels', halved)
    assert min(entry.identical for entry in compare_codes(detector, path, image(detector), exact=True)) < 0.9


@torch.no_grad()
def test_a_convolution_is_an_integer_sum_times_one_factor(exported):
    detector, structure, _ = exported
    layer = next(layer for layer in structure.layers if layer.outputs and layer.outputs[0] and not any(
        detector.ptq.activations[name].num_channels for name in (layer.inputs[0], layer.outputs[0])))
    conv, quantized = detector.get_submodule(layer.name), quantized_weights(detector)[layer.name]
    source, target = (detector.ptq.activations[name] for name in (layer.inputs[0], layer.outputs[0]))
    seen = []
    handle = conv.register_forward_hook(lambda _, args, output: seen.append(source.encode(args[0])))
    with integer_arithmetic(detector), _recorded(detector, {}) as codes:
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


@pytest.mark.parametrize('operation', ['Add', 'Mul'])
@pytest.mark.parametrize('symmetric', [False, True])
def test_two_tensors_are_combined_as_the_runtime_does(operation, symmetric):
    dtype, kind = (np.int8, TensorProto.INT8) if symmetric else (np.uint8, TensorProto.UINT8)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    rng, every = np.random.default_rng(0), np.arange(low, high + 1, dtype=dtype)
    a, b = (grid.reshape(1, -1) for grid in np.meshgrid(every, every))
    for ties in (True, False):
        quantizers = [AffineQuantizer(8, symmetric=symmetric) for _ in range(3)]
        for quantizer in quantizers:
            quantizer.scale.data.fill_(float(rng.integers(1, 64) / 1024 if ties else rng.uniform(0.02, 0.05)))
            quantizer.zero_point.fill_(0 if symmetric else int(rng.integers(0, 256)))
        pairs = [[numpy_helper.from_array(q.scale.detach().numpy(), f's{i}'),
                  numpy_helper.from_array(q.zero_point.numpy().astype(dtype), f'z{i}')]
                 for i, q in enumerate(quantizers)]
        nodes = [helper.make_node('DequantizeLinear', ['a', 's0', 'z0'], ['x']),
                 helper.make_node('DequantizeLinear', ['b', 's1', 'z1'], ['y']),
                 helper.make_node(operation, ['x', 'y'], ['float']),
                 helper.make_node('QuantizeLinear', ['float', 's2', 'z2'], ['c'])]
        a_info, b_info, c_info = (helper.make_tensor_value_info(name, kind, a.shape) for name in 'abc')
        graph = helper.make_graph(nodes, operation, [a_info, b_info], [c_info], sum(pairs, []))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
        wanted = session.run(None, {'a': a, 'b': b})[0]
        result = (module.Sum if operation == 'Add' else module.Product)(
            torch.from_numpy(a).int(), torch.from_numpy(b).int(), tuple(quantizers[:2]))
        with torch.no_grad():
            found = quantizers[2].encode(result.value(quantizers[2])).numpy()
        # kernels of other processors add in another order
        x86 = platform.machine().lower() in ('x86_64', 'amd64')
        assert (found == wanted).mean() >= (1 if x86 else 0.999)


@pytest.mark.parametrize('symmetric', [False, True])
def test_a_sigmoid_is_the_runtimes_table(symmetric):
    dtype, kind = (np.int8, TensorProto.INT8) if symmetric else (np.uint8, TensorProto.UINT8)
    every = np.arange(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, dtype=dtype)
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(40):
        source, output = AffineQuantizer(8, symmetric=symmetric), AffineQuantizer(8, symmetric=symmetric)
        source.scale.data.fill_(float(rng.uniform(0.01, 0.2)))
        output.scale.data.fill_(1 / (127 if symmetric else 255))
        for quantizer in (source, output):
            quantizer.zero_point.fill_(0 if symmetric or quantizer is output else int(rng.integers(0, 256)))
        pairs = [[numpy_helper.from_array(q.scale.detach().numpy(), f's{i}'),
                  numpy_helper.from_array(q.zero_point.numpy().astype(dtype), f'z{i}')]
                 for i, q in enumerate((source, output))]
        nodes = [helper.make_node('DequantizeLinear', ['a', 's0', 'z0'], ['x']),
                 helper.make_node('Sigmoid', ['x'], ['float']),
                 helper.make_node('QuantizeLinear', ['float', 's1', 'z1'], ['c'])]
        a_info, c_info = (helper.make_tensor_value_info(name, kind, every.shape) for name in 'ac')
        graph = helper.make_graph(nodes, 'sigmoid', [a_info], [c_info], sum(pairs, []))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
        wanted = session.run(None, {'a': every})[0]
        found = output.encode(module.Sigmoid(torch.from_numpy(every).int(), source).value(output)).numpy()
        wrong += int((found != wanted).sum())
    # kernels of other processors add in another order
    assert wrong <= (0 if platform.machine().lower() in ('x86_64', 'amd64') else 10)


def test_a_relu_that_the_quantizer_does_not_repeat_stays_simulated():
    quantizer = AffineQuantizer(8, symmetric=True)
    quantizer.scale.data.fill_(0.05)
    codes = torch.arange(-128, 128, dtype=torch.int32)
    for ends in ([], [float('inf')]):
        value = module.Sum(codes, codes, (quantizer, quantizer), ends=ends).value(quantizer)
        assert (value is None) == bool(ends)


def test_afterwards_the_detector_is_simulated_as_before(exported):
    detector, _, _ = exported
    before = raw_outputs(detector)
    hooks = [len(m._forward_hooks) for m in detector.modules()]
    with pytest.raises(KeyboardInterrupt), integer_arithmetic(detector):
        raise KeyboardInterrupt
    assert [len(m._forward_hooks) for m in detector.modules()] == hooks
    assert not {'run', 'write'} & set(vars(detector.ptq.flow))
    assert all(hook.enabled for hook in detector.ptq.hooks if isinstance(hook, SharedBias))
    for first, second in zip(before, raw_outputs(detector), strict=True):
        assert torch.equal(first, second)
