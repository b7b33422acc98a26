import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmdet_ptq.calibration.protection.candidates import candidates_for
from mmdet_ptq.calibration.protection.damage import OutputError
from mmdet_ptq.calibration.protection.sensitivity import ACTIVATION, TensorSet
from mmdet_ptq.config import PTQConfig, TensorConfig
from mmdet_ptq.deploy import export_onnx, open_model, settle_biases
from mmdet_ptq.deploy.ncnn.formats import check_ncnn
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer, build_observer
from mmdet_ptq.testing import predict, raw_outputs, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.wrapping import coverage_rows, freeze_weights, prepare_detector, quantization_mode
from mmdet_ptq.wrapping.preparing.migration import can_migrate, factors_of, times_factor
from mmdet_ptq.wrapping.state import ChannelDivision, only_read_tensors, quantize_only
from mmdet_ptq.wrapping.watching.layers import is_depthwise

MIN_MAX = dict(type='mmdet_ptq.MinMaxObserver')
SHAPE = (1, 3, 64, 64)


def block(strength=1.0, bits=4, **more):
    return dict(preset='w8a8_observe', activations=dict(bits=bits, observer=MIN_MAX, scale_migration=strength), **more)


@functools.cache
def quantized(kind='yolox', dataflow=None):
    """A detector that several tests look at; none changes it."""
    return tiny_quantized(kind, block(dataflow=dataflow))


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize('kind', ['yolox', 'ssd', 'retinanet'])
@pytest.mark.parametrize('dataflow', [None, 'auto'])
def test_the_float_detector_stays_what_it_was(kind, dataflow):
    detector, structure = quantized(kind, dataflow)
    with quantization_mode(detector, 'float'):
        close(raw_outputs(detector), raw_outputs(tiny_detector(kind)))
    # nor does it matter which tensors are quantized
    with quantize_only(detector, (), ()):
        close(raw_outputs(detector), raw_outputs(tiny_detector(kind)))
    factors = [division.factor for division in detector.ptq.divisions.values()]
    assert factors and any((factor != 1).any() for factor in factors)


@pytest.mark.parametrize('kind', ['yolox', 'retinanet'])
def test_who_takes_part(kind):
    detector, structure = quantized(kind)
    expected = set()
    for name in structure.activations:
        readers = [layer for layer in structure.layers if name in layer.inputs]
        modules = [detector.get_submodule(layer.name) for layer in readers]
        if all(len(layer.inputs) == 1 and m.groups == 1 for layer, m in zip(readers, modules, strict=True)):
            expected.add(name)
    assert set(detector.ptq.divisions) == expected
    assert {name for name, entry in structure.activations.items() if entry.divided} == expected
    shared = [layer.name for layer in structure.layers if len(layer.inputs) > 1]
    depthwise = [layer.name for layer in structure.layers if is_depthwise(detector.get_submodule(layer.name))]
    assert shared if kind == 'retinanet' else depthwise
    assert not can_migrate(nn.Conv2d(4, 4, 1), 2) and not can_migrate(nn.Conv2d(4, 4, 1, groups=2), 1)


def test_nothing_moves_unless_it_is_asked_for():
    detector, structure = tiny_quantized('yolox', block(0.0))
    assert not detector.ptq.divisions and not any(entry.divided for entry in structure.activations.values())


def test_it_is_quantization_with_a_scale_per_channel():
    channels = 6
    division, one = ChannelDivision(channels, 1), AffineQuantizer(4)
    division.factor.copy_(torch.logspace(-2, 2, channels))
    one.set_range(torch.tensor(-0.3), torch.tensor(1.0))
    own = AffineQuantizer(4, num_channels=channels, shared_zero_point=True)
    with torch.no_grad():
        own.scale.copy_(one.scale * division.factor)
        own.zero_point.copy_(one.zero_point.expand(channels))
    x = torch.randn(2, channels, 9, 9) * division.factor.view(-1, 1, 1)
    torch.testing.assert_close(one(division(x)) * division.factor.view(-1, 1, 1), own(x))


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8), st.floats(0.1, 1), st.sampled_from([4, 8]))
def test_factors_are_bounded_scales_around_one(ranges, strength, bits):
    observer = build_observer({**MIN_MAX, 'num_channels': len(ranges) + 1, 'channel_axis': 1})
    high = torch.tensor([0.0, *ranges])  # the first channel is dead
    observer.update(torch.stack([torch.zeros_like(high), high]))
    factor = factors_of(observer, TensorConfig(bits=bits, observer=MIN_MAX), strength).double()
    relative = torch.tensor(ranges, dtype=torch.float64) / torch.tensor(ranges, dtype=torch.float64).log().mean().exp()
    assert torch.allclose(factor[1:], relative.clamp(1 / 16, 16).pow(strength), rtol=1e-3) and factor[0] == 1


@pytest.mark.parametrize(
    'layer',
    [nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(3, 5, 2, stride=2), nn.Linear(3, 5)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_weight_takes_over_the_factors_of_its_input(layer):
    factor = torch.tensor([0.5, 2.0, 3.0])
    shape = (2, 3) if isinstance(layer, nn.Linear) else (2, 3, 6, 6)
    x = torch.randn(shape)
    expected = layer(x)
    with torch.no_grad():
        layer.weight.copy_(times_factor(layer, layer.weight, factor))
    torch.testing.assert_close(layer(x / factor.view(1, 3, *[1] * (len(shape) - 2))), expected)


def image(detector, seed=3):
    return detector.data_preprocessor(tiny_batch(1, seed=seed), False)['inputs']


@pytest.mark.thorough
@pytest.mark.parametrize('kind,dataflow', [('yolox', 'auto'), ('retinanet', 'auto')])
def test_onnx_runtime_computes_the_simulated_codes(kind, dataflow, tmp_path):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    detector, structure = copy.deepcopy(quantized(kind, dataflow))
    settle_biases(detector, structure)
    freeze_weights(detector)
    export_onnx(detector, tmp_path / 'model.onnx', SHAPE)
    found = compare_codes(detector, tmp_path / 'model.onnx', image(detector), follow=True)
    assert len(found) >= len(structure.activations) and min(entry.identical for entry in found) > 0.999
    assert not open_model(tmp_path / 'model.onnx').coverage().float


@pytest.mark.thorough
@pytest.mark.parametrize('kind', ['yolox', 'ssd'])  # behind SiLU; behind convolutions without activation, too
def test_openvino_multiplies_the_same_integers(kind, tmp_path):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    from mmdet_ptq.deploy import get_runtime
    from mmdet_ptq.deploy.agreement import compare_layer_inputs
    from mmdet_ptq.deploy.openvino.layer_inputs import openvino_inputs

    detector, structure = copy.deepcopy(quantized(kind, 'auto'))
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = get_runtime('openvino').export(detector, tmp_path, SHAPE)
    pixels = image(detector)
    found = compare_layer_inputs(detector, openvino_inputs(path, pixels), pixels, follow=True, within=only_read_tensors)
    assert min(entry.identical for entry in found) > 0.999 and not open_model(path).coverage().float


def test_ncnn_refuses_it():
    _, structure = quantized()
    with pytest.raises(PTQError, match=r'set `ptq.activations.scale_migration=0`'):
        check_ncnn(structure)


def uneven(detector, structure):
    """The activation whose factors differ most, and the layers that read it."""
    factors = {name: division.factor for name, division in detector.ptq.divisions.items()}
    name = max(factors, key=lambda name: float(factors[name].max() / factors[name].min()))
    assert factors[name].max() > 5 * factors[name].min()
    return name, tuple(layer.name for layer in structure.layers if name in layer.inputs)


def test_protection_never_makes_a_divided_tensor_float():
    detector, structure = quantized()
    name, layers = uneven(detector, structure)
    kinds = ['range', '8bit', '16bit', 'float']
    found = candidates_for(detector, structure, TensorSet(ACTIVATION, (name,), layers), kinds, {})
    assert {candidate.kind for candidate in found} == {'range', '8bit', '16bit'}
    depthwise = next(n for n in structure.activations if n not in detector.ptq.divisions)
    readers = tuple(layer.name for layer in structure.layers if depthwise in layer.inputs)
    found = candidates_for(detector, structure, TensorSet(ACTIVATION, (depthwise,), readers), kinds, {})
    assert 'float' in {candidate.kind for candidate in found}


@pytest.mark.thorough
@pytest.mark.parametrize(
    'change',
    [
        dict(weights=dict(float=True)),
        dict(weights=dict(bits=4)),
        dict(activations=dict(bits=8)),
        dict(activations=dict(observer=dict(type='mmdet_ptq.PercentileObserver'))),
    ],
    ids=str,
)
def test_another_format_keeps_the_factors(change):
    detector, structure = quantized()
    name, layers = uneven(detector, structure)
    changed, _ = tiny_quantized('yolox', block(overrides=dict.fromkeys(layers, change)))
    assert torch.equal(changed.ptq.divisions[name].factor, detector.ptq.divisions[name].factor)
    with quantization_mode(changed, 'float'):
        close(raw_outputs(changed), raw_outputs(tiny_detector('yolox')))


def test_the_error_of_an_output_is_told_against_the_float_layer():
    detector, structure = quantized()
    name, layers = uneven(detector, structure)
    meter = OutputError(detector, layers, ())
    with torch.no_grad(), quantize_only(detector, [name], ()), meter.listening():
        raw_outputs(detector)
    assert 0 < meter.ratio < 0.1
    meter = OutputError(detector, layers, ())
    meter.divisions = {}  # the float layer would read what is not divided
    with torch.no_grad(), quantize_only(detector, [name], ()), meter.listening():
        raw_outputs(detector)
    assert meter.ratio > 0.1


def test_a_tensor_that_is_not_finite_is_named():
    detector = tiny_detector('yolox')
    with torch.no_grad():
        detector.backbone.stage1[0].depthwise_conv.bn.bias.fill_(1e38)
        detector.backbone.stage1[0].depthwise_conv.bn.weight.fill_(1e38)
    with pytest.raises(PTQError, match=r'input of layer backbone\.stage1\.0\.pointwise_conv\.conv: .*NaN or infinity'):
        prepare_detector(detector, PTQConfig.from_dict(block()), lambda: predict(detector, tiny_batch(1)))


def test_a_strength_out_of_range_is_refused():
    with pytest.raises(PTQError, match=r'`ptq.activations.scale_migration` must lie between 0 and 1, got 2'):
        PTQConfig.from_dict(block(2))
    with pytest.raises(PTQError, match=r'`ptq.weights.scale_migration` means nothing; it belongs to activations'):
        PTQConfig.from_dict(block(weights=dict(scale_migration=1.0)))


def test_a_weight_that_two_layers_share_keeps_its_own():
    detector = tiny_detector('yolox')
    first, second = (detector.get_submodule(f'bbox_head.multi_level_conv_reg.{level}') for level in (0, 1))
    second.weight = first.weight
    structure = prepare_detector(detector, PTQConfig.from_dict(block()), lambda: predict(detector, tiny_batch(1)))
    layers = {layer.name: layer for layer in structure.layers}
    for name, divided in (('conv_reg', False), ('conv_cls', True)):
        (activation,) = layers[f'bbox_head.multi_level_{name}.0'].inputs
        assert (structure.activations[activation].divided is not None) == divided


def test_the_coverage_table_tells():
    _, structure = quantized()
    told = {row.activation for row in coverage_rows(structure)}
    assert '4-bit affine (scales migrated)' in told and '4-bit affine per channel' in told
