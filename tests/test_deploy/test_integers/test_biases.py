import copy

import onnx
import pytest
import torch

from mmdet_ptq.deploy import export_onnx, integer_weight, load_quantized_state, quantized_state, settle_biases
from mmdet_ptq.deploy.integers.biases import SharedBias, float_shared_biases
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.testing import raw_outputs, tiny_batch, tiny_detector, tiny_model_cfg, tiny_quantized
from mmdet_ptq.wrapping import float_weight, freeze_weights, quantization_mode, quantized_weights
from mmdet_ptq.wrapping.state import quantize_only

MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
FULL = dict(preset='w8a8_observe', activations=MIN_MAX, dataflow='full')
SHAPE = (1, 3, 64, 64)


def image(detector):
    return detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']


@pytest.fixture(scope='module')
def made():
    return tiny_quantized('retinanet', FULL)


@pytest.fixture(scope='module')
def settled(made):
    detector = copy.deepcopy(made[0])
    settle_biases(detector, made[1])
    return detector


def shared_hooks(detector):
    return [hook for hook in detector.ptq.hooks if isinstance(hook, SharedBias)]


def steps(detector, layer):
    """Input scale x weight scale, one row per call."""
    quantized = quantized_weights(detector)[layer.name]
    weight = integer_weight(quantized.quantizer, quantized.codes(float_weight(detector.get_submodule(layer.name))))
    return [detector.ptq.activations[name].positive_scale().detach() * weight.scale for name in layer.inputs]


def test_biases_lie_on_the_grid_of_the_accumulator():
    detector, structure = tiny_quantized('retinanet')
    before = {layer.name: detector.get_submodule(layer.name).bias.detach().clone() for layer in structure.layers}
    settled = settle_biases(detector, structure)
    moved = 0
    for layer in structure.layers:
        module = detector.get_submodule(layer.name)
        if len(set(layer.inputs)) > 1:
            # several levels: several grids
            assert layer.name not in settled and torch.equal(module.bias, before[layer.name])
            continue
        assert layer.name in settled
        step = steps(detector, layer)[0]
        codes = module.bias / step
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=1e-3)
        # a bias is a multiple of the step up to float32's own rounding
        rounding = torch.finfo(torch.float32).eps * module.bias.abs()
        assert ((module.bias - before[layer.name]).abs() <= 0.5001 * step + rounding).all()
        moved += not torch.equal(module.bias, before[layer.name])
    assert moved > 5
    kept = {name: detector.get_submodule(name).bias.detach().clone() for name in settled}
    hooks = len(detector.ptq.hooks)
    settle_biases(detector, structure)
    assert all(torch.equal(detector.get_submodule(name).bias, value) for name, value in kept.items())
    assert len(detector.ptq.hooks) == hooks


def test_every_call_of_a_shared_layer_adds_the_bias_of_its_own_grid():
    detector, structure = tiny_quantized('retinanet')
    settle_biases(detector, structure)
    layer = next(layer for layer in structure.layers if layer.name == 'bbox_head.retina_cls')
    module, shifts = detector.get_submodule(layer.name), []
    # to outputs of zeros the shift of the bias is added without error
    module.register_forward_hook(lambda module, args, output: torch.zeros_like(output), prepend=True)
    module.register_forward_hook(lambda module, args, output: shifts.append(output[0, :, 0, 0].detach()))
    raw_outputs(detector, tiny_batch(1))
    bias = module.bias.detach()
    assert len(shifts) == len(layer.inputs) > 1
    for shift, step in zip(shifts, steps(detector, layer), strict=True):
        torch.testing.assert_close(bias + shift, (bias / step).round() * step, rtol=0, atol=1e-6)
        assert (shift.abs() <= 0.5001 * step).all() and shift.any()
    assert not torch.equal(shifts[0], shifts[1])


class Blind(dict):
    """Observers that see nothing."""

    def __missing__(self, name):
        return self

    def update(self, x):
        pass


def test_float_and_observing_passes_add_the_bias_as_it_is(settled):
    settled, untouched = copy.deepcopy(settled), copy.deepcopy(settled)
    settled.ptq.observers = untouched.ptq.observers = Blind()
    for hook in shared_hooks(untouched):
        hook.enabled = False
    assert any(not torch.equal(a, b) for a, b in zip(raw_outputs(settled), raw_outputs(untouched), strict=True))
    for mode in ('float', 'observe'):
        with quantization_mode(settled, mode), quantization_mode(untouched, mode):
            for ours, theirs in zip(raw_outputs(settled), raw_outputs(untouched), strict=True):
                assert torch.equal(ours, theirs)
    weights = set(quantized_weights(settled))
    with quantize_only(settled, (), weights), quantize_only(untouched, (), weights):
        for ours, theirs in zip(raw_outputs(settled), raw_outputs(untouched), strict=True):
            assert torch.equal(ours, theirs)


def test_a_copy_has_hooks_of_its_own(settled):
    other = copy.deepcopy(settled)
    before = raw_outputs(settled)
    with float_shared_biases(other):
        assert not any(hook.enabled for hook in shared_hooks(other))
        assert all(hook.enabled for hook in shared_hooks(settled))
        assert all(torch.equal(a, b) for a, b in zip(before, raw_outputs(settled), strict=True))
    assert all(hook.enabled and hook.state is other.ptq for hook in shared_hooks(other))
    for hook in shared_hooks(other):
        assert hook.weight is quantized_weights(other)[hook.layer]
    assert all(torch.equal(a, b) for a, b in zip(before, raw_outputs(other), strict=True))


def test_a_loaded_checkpoint_computes_the_same(made):
    detector, structure = copy.deepcopy(made)
    settle_biases(detector, structure)
    freeze_weights(detector)
    loaded = tiny_detector('retinanet', seed=5)
    load_quantized_state(loaded, quantized_state(detector, structure, dict(model=tiny_model_cfg('retinanet')), {}))
    assert len(shared_hooks(loaded)) == len(shared_hooks(detector)) > 0
    assert all(torch.equal(a, b) for a, b in zip(raw_outputs(detector), raw_outputs(loaded.eval()), strict=True))


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino', 'tensorrt'])
def test_exported_graphs_get_the_bias_as_it_is(settled, runtime, tmp_path, monkeypatch):
    seen = []

    def interrupted(*args, **kwargs):
        seen.extend(hook.enabled for hook in shared_hooks(settled))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, 'export', interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(settled, tmp_path / 'model.onnx', SHAPE, runtime=runtime)
    assert seen and not any(seen)
    assert all(hook.enabled for hook in shared_hooks(settled))


@torch.no_grad()
@pytest.mark.thorough
def test_a_dead_channel_gets_a_bias_that_fits_an_int32(tmp_path, monkeypatch):
    def with_dead_channels(*args):
        detector = tiny_detector(*args)
        norm = detector.backbone.bn1
        norm.weight[:2], norm.bias[:2] = 1e-12, torch.tensor([0.5, -0.5])
        return detector

    monkeypatch.setattr('mmdet_ptq.testing.calibrated.tiny_detector', with_dead_channels)
    detector, structure = tiny_quantized('retinanet', FULL)
    layer = next(layer for layer in structure.layers if layer.name == 'backbone.conv1')
    module, x = detector.get_submodule(layer.name), image(detector)
    before = module._conv_forward(x, module.weight, module.bias)
    assert (module.bias[:2] / steps(detector, layer)[0][:2]).abs().min() > 2**31
    bias = module.bias.clone()
    assert layer.name in settle_biases(detector, structure)
    step = steps(detector, layer)[0]
    assert (module.bias / step).abs().max() <= 2**30 * 1.0001
    assert ((module.bias - bias).abs() <= 0.5001 * step).all()
    torch.testing.assert_close(module._conv_forward(x, module.weight, module.bias), before, rtol=0, atol=1e-3)
    path = tmp_path / 'model.onnx'
    export_onnx(detector, path, SHAPE)
    graph = onnx.load(path).graph
    types = {entry.name: entry.data_type for entry in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    stem = next(node for node in graph.node if node.op_type == 'Conv')
    assert types[producers[stem.input[2]].input[0]] == onnx.TensorProto.INT32
    for entry in compare_codes(detector, path, image(detector)):
        assert entry.identical >= 0.999, entry


def test_integers_times_scale_are_the_quantized_weight():
    detector, _ = tiny_quantized('retinanet', dict(preset='w4a8', activations=MIN_MAX))
    for name, quantized in quantized_weights(detector).items():
        layer = detector.get_submodule(name)
        weight = integer_weight(quantized.quantizer, quantized.codes(float_weight(layer)))
        assert weight.fits_int8 and weight.scale.shape == (len(weight.codes),)
        assert torch.equal(quantized.layout.from_rows(weight.values(), layer.weight.shape), layer.weight)
