import copy
from collections import Counter

import pytest
import torch
from architectures import semi_supervised
from torch import nn

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import KINDS, predict, raw_outputs, tiny_batch, tiny_detector
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import (
    Structure,
    apply_structure,
    coverage_rows,
    float_weight,
    integer_mac_share,
    prepare_detector,
    quantization_mode,
    quantized_weights,
    set_mode,
)
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.watching.layers import QUANTIZABLE, channel_format, is_depthwise
from mmdet_ptq.wrapping.watching.probe import probe_detector
from mmdet_ptq.wrapping.weights import QuantizedWeight


def _same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('kind', KINDS)
def test_everything_is_in_integers(quantized, kind):
    detector, structure = quantized(kind)
    assert integer_mac_share(structure) == 1.0
    names = {n for n, m in detector.named_modules() if isinstance(m, QUANTIZABLE)}
    assert {layer.name for layer in structure.layers} == names == set(quantized_weights(detector))
    assert all(row.integer and not row.reason for row in coverage_rows(structure))


def test_a_refused_override_changes_nothing():
    detector = tiny_detector('retinanet')
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(PTQError, match='matches no layer'):
        prepare_detector(
            detector,
            PTQConfig.from_dict(dict(overrides={'nothing': 'float'})),
            lambda: predict(detector, tiny_batch(1)),
        )
    after = detector.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


READERS = ['bbox_head.cls_convs.0.conv', 'bbox_head.reg_convs.0.conv']
MIN_MAX, PERCENTILE = 'mmdet_ptq.MinMaxObserver', 'mmdet_ptq.PercentileObserver'


@pytest.mark.parametrize(
    ('first', 'second', 'observer', 'told'),
    [
        (MIN_MAX, None, MIN_MAX, False),
        (None, MIN_MAX, MIN_MAX, False),
        (MIN_MAX, MIN_MAX, MIN_MAX, False),
        (MIN_MAX, PERCENTILE, MIN_MAX, True),
    ],
)
def test_an_override_of_any_reader_of_a_tensor_holds(monkeypatch, first, second, observer, told):
    lines = []
    monkeypatch.setattr('mmdet_ptq.wrapping.preparing.prepare.print_log', lambda text, *_, **__: lines.append(text))
    overrides = {
        name: dict(activations=dict(observer=dict(type=kind)))
        for name, kind in zip(READERS, (first, second), strict=True)
        if kind
    }
    detector = tiny_detector('retinanet')
    structure = prepare_detector(
        detector,
        PTQConfig.from_dict(dict(preset='w8a8_observe', overrides=overrides)),
        lambda: predict(detector, tiny_batch(1)),
    )
    names = {layer.name: layer.inputs for layer in structure.layers}
    assert names[READERS[0]] == names[READERS[1]]
    assert {structure.activations[name].observer['type'] for name in names[READERS[0]]} == {observer}
    assert any(READERS[1] in line and 'one tensor has one quantizer' in line for line in lines) == told


def test_shares_of_the_coverage_table_add_up(toy, image):
    macs = probe_detector(toy, lambda: toy(image)).image_macs
    cfg = PTQConfig.from_dict(
        dict(preset='w8a8_observe', overrides={'pointwise': 'float', 'linear': dict(activations=dict(float=True))})
    )
    structure = prepare_detector(toy, cfg, lambda: toy(image))
    rows = {row.name: row for row in coverage_rows(structure)}
    assert sum(row.macs for row in rows.values()) == macs
    left = rows['pointwise'].macs + rows['linear'].macs
    assert integer_mac_share(structure) == pytest.approx(1 - left / macs, rel=1e-12)
    assert (rows['pointwise'].weight, rows['pointwise'].activation) == ('float', 'float')
    assert (rows['linear'].weight, rows['linear'].activation) == ('8-bit affine', 'float')
    assert rows['depthwise'].activation == '8-bit affine per channel'
    assert 'left float by the policy' in rows['pointwise'].reason and rows['linear'].reason


@pytest.mark.parametrize('kind', KINDS)
def test_types_and_weights(quantized, kind):
    detector, _ = quantized(kind)
    original = dict(tiny_detector(kind).named_modules())
    for name, quantized_weight in quantized_weights(detector).items():
        layer = detector.get_submodule(name)
        assert isinstance(layer, type(original[name]))
        codes = quantized_weight.codes(float_weight(layer))
        low, high = quantized_weight.quantizer.code_range
        assert low <= codes.min() and codes.max() <= high
        expected = quantized_weight.layout.from_rows(quantized_weight.quantizer.decode(codes), layer.weight.shape)
        assert torch.equal(layer.weight, expected)
        assert not torch.equal(layer.weight, float_weight(layer))


@pytest.mark.parametrize('kind', ['retinanet', 'rtmdet', 'faster_rcnn'])
def test_float_mode_is_the_folded_detector_exactly(quantized, kind):
    detector, structure = quantized(kind)
    folded = tiny_detector(kind)
    fold_norms(folded, structure.folds)
    expected, before = raw_outputs(folded), raw_outputs(detector)
    with quantization_mode(detector, 'float'):
        assert _same(raw_outputs(detector), expected)
    assert _same(raw_outputs(detector), before)
    assert not _same(before, expected)


def test_unknown_mode(quantized):
    with pytest.raises(ValueError, match='mode must be one of'):
        set_mode(quantized('retinanet')[0], 'int8')


@pytest.mark.parametrize('kind', ['retinanet', 'yolox'])
def test_deep_copy_is_independent(quantized, kind):
    detector, _ = quantized(kind)
    before = raw_outputs(detector)
    for part in ('activations', 'weights'):
        other = copy.deepcopy(detector)
        assert _same(raw_outputs(other), before)
        quantizers = (
            other.ptq.activations.values()
            if part == 'activations'
            else [w.quantizer for w in quantized_weights(other).values()]
        )
        with torch.no_grad():
            for quantizer in quantizers:
                quantizer.scale.mul_(4)
        assert not _same(raw_outputs(other), before)
        assert _same(raw_outputs(detector), before)
    set_mode(other, 'float')
    assert _same(raw_outputs(detector), before)


@pytest.mark.parametrize('kind', KINDS)
def test_state_dict_and_structure_rebuild_the_detector(quantized, kind):
    detector, structure = quantized(kind)
    other = tiny_detector(kind, seed=3)
    apply_structure(other, Structure.from_dict(structure.to_dict()))
    other.load_state_dict(detector.state_dict())
    assert _same(raw_outputs(other), raw_outputs(detector))


def test_quantizing_twice_is_refused(quantized):
    detector, structure = quantized('retinanet')
    with pytest.raises(PTQError, match='already quantized'):
        apply_structure(copy.deepcopy(detector), structure)


def test_structure_of_another_detector_is_refused(quantized):
    with pytest.raises(PTQError, match='no layer|lacks'):
        apply_structure(tiny_detector('ssd'), quantized('retinanet')[1])


@pytest.mark.parametrize('kind', KINDS)
def test_every_tensor_and_weight_is_quantized_once(quantized, kind, monkeypatch):
    detector = copy.deepcopy(quantized(kind)[0])
    calls = Counter()
    for name, quantizer in detector.ptq.activations.items():
        quantizer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    quantize = QuantizedWeight._quantize

    def counted(self, weight):
        calls.update([id(self)])
        return quantize(self, weight)

    monkeypatch.setattr(QuantizedWeight, '_quantize', counted)
    raw_outputs(detector)
    expected = {*detector.ptq.activations, *(id(w) for w in quantized_weights(detector).values())}
    assert set(calls) == expected
    assert set(calls.values()) == {1}


def test_a_shared_head_has_one_range_per_level(quantized):
    detector, structure = quantized('retinanet')
    inputs = {layer.name: layer.inputs for layer in structure.layers}
    for name in ('cls_convs.0.conv', 'reg_convs.0.conv', 'retina_cls', 'retina_reg'):
        assert len(set(inputs[f'bbox_head.{name}'])) == 3
    assert inputs['bbox_head.cls_convs.0.conv'] == inputs['bbox_head.reg_convs.0.conv']
    scales = {detector.ptq.activations[n].scale.item() for n in inputs['bbox_head.retina_cls']}
    assert len(scales) == 3


def _assert_empty(detector):
    assert not detector.ptq._shared
    assert all(w._cached is None and not w.caching for w in quantized_weights(detector).values())
    assert all(hook.calls == 0 for hook in detector.ptq.hooks)


def test_caches_are_empty_after_a_forward_and_after_an_exception(quantized):
    detector = copy.deepcopy(quantized('retinanet')[0])
    before = raw_outputs(detector)
    _assert_empty(detector)

    def fail(*_):
        raise RuntimeError('in the middle of a forward pass')

    handle = detector.bbox_head.retina_cls.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match='in the middle'):
        raw_outputs(detector)
    _assert_empty(detector)
    handle.remove()
    assert _same(raw_outputs(detector), before)


def test_gradients_flow_through_a_weight_used_on_every_level(quantized):
    detector = copy.deepcopy(quantized('retinanet')[0])
    for _ in range(2):  # a stale cache would be a freed graph
        data = detector.data_preprocessor(tiny_batch(1), False)
        sum(t.sum() for group in detector(**data, mode='tensor') for t in group).backward()
    assert float_weight(detector.bbox_head.retina_cls).grad.any()


@pytest.mark.parametrize('kind', ['ssd', 'yolox', 'retinanet'])
def test_per_channel_activations_on_depthwise_inputs_only(quantized, kind):
    detector, structure = quantized(kind)
    readers = {}
    for layer in structure.layers:
        for name in layer.inputs:
            readers.setdefault(name, []).append(is_depthwise(detector.get_submodule(layer.name)))
    for name, depthwise in readers.items():
        quantizer = detector.ptq.activations[name]
        assert (quantizer.num_channels is not None) == all(depthwise), name
        assert not quantizer.shared_zero_point
    assert any(all(d) for d in readers.values()) == (kind != 'retinanet')


@pytest.mark.parametrize(
    'quantizer, shared',
    [
        (dict(type='mmdet_ptq.AffineQuantizer'), True),
        (dict(type='AffineQuantizer', symmetric=False), True),
        (dict(type='mmdet_ptq.AffineQuantizer', symmetric=True), False),
        (dict(type='mmdet_ptq.LogAffineQuantizer'), False),
    ],
)
def test_one_zero_point_for_all_channels_where_the_format_has_one(quantizer, shared):
    found = channel_format(quantizer, 5, -1)
    assert found == dict(num_channels=5, channel_axis=-1, **(dict(shared_zero_point=True) if shared else {}))


def test_per_channel_activations_can_be_switched_off(toy, image):
    cfg = PTQConfig.from_dict(dict(preset='w8a8_observe', activations=dict(depthwise_per_channel=False)))
    structure = prepare_detector(toy, cfg, lambda: toy(image))
    assert {entry.spec['num_channels'] for entry in structure.activations.values()} == {None}


def test_activation_checkpointing_is_switched_off():
    detector = tiny_detector('retinanet')
    for module in detector.backbone.modules():
        if hasattr(module, 'with_cp'):
            module.with_cp = True
    cfg = PTQConfig.from_dict(dict(preset='w8a8_observe'))
    data = detector.data_preprocessor(tiny_batch(1), False)
    prepare_detector(detector, cfg, lambda: detector(**data, mode='predict'))
    assert not any(getattr(m, 'with_cp', False) for m in detector.modules())


@pytest.mark.parametrize('bits', [2, 3, 4, 5, 6, 7, 8, 16])
def test_every_bit_width(toy, image, bits):
    cfg = PTQConfig.from_dict(dict(preset='w8a8_observe', weights=dict(bits=bits), activations=dict(bits=bits)))
    structure = prepare_detector(toy, cfg, lambda: toy(image))
    assert {layer.weight['bits'] for layer in structure.layers} == {bits}
    assert {entry.spec['bits'] for entry in structure.activations.values()} == {bits}
    for quantized_weight in quantized_weights(toy).values():
        low, high = quantized_weight.quantizer.code_range
        assert high - low + 1 == 2**bits
    for row in toy.pointwise.weight.flatten(1):
        assert len(row.unique()) <= 2**bits


def _structure(toy, image, **block):
    cfg = PTQConfig.from_dict(dict(preset='w8a8_observe') | block)
    structure = prepare_detector(toy, cfg, lambda: toy(image))
    formats = {}
    for layer in structure.layers:
        weight = layer.weight and (layer.weight['type'].rpartition('.')[2], layer.weight['bits'])
        inputs = [n and structure.activations[n].spec['bits'] for n in layer.inputs]
        formats[layer.name.removeprefix('bbox_head.')] = weight, inputs
    return formats


AFFINE, LOG_AFFINE = 'AffineQuantizer', 'LogAffineQuantizer'


def test_head_float(toy, image):
    formats = _structure(toy, image, head='float')
    assert formats['conv'] == formats['out'] == (None, [None, None])
    assert formats['pointwise'] == ((AFFINE, 8), [8])


def test_head_float_outputs(toy, image):
    formats = _structure(toy, image, head='float_outputs')
    assert formats['conv'] == ((AFFINE, 8), [8, 8])
    assert formats['out'] == (None, [None, None])


def test_head_affine(toy, image):
    formats = _structure(copy.deepcopy(toy), image, preset='w4a8', head='affine')
    assert formats['conv'] == ((AFFINE, 4), [8, 8])
    assert formats['out'] == ((AFFINE, 8), [8, 8])
    uniform = dict(quantizer=dict(type='mmdet_ptq.AffineQuantizer'))
    formats = _structure(toy, image, preset='w4a8', weights=uniform)
    assert {weight[0] for weight, _ in formats.values()} == {AFFINE}


def test_head_log_affine(toy, image):
    formats = _structure(toy, image, head='log_affine')
    assert formats['conv'] == ((LOG_AFFINE, 8), [8, 8])
    assert formats['out'] == ((LOG_AFFINE, 8), [8, 8])
    assert formats['pointwise'] == ((AFFINE, 8), [8])


def test_low_bit_preset_keeps_its_ends_in_eight_bits(toy, image):
    log_affine = dict(weights=dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer', mode='log1p')))
    uniform = dict(quantizer=dict(type='mmdet_ptq.AffineQuantizer'))
    formats = _structure(toy, image, preset='w4a4', weights=uniform, head=log_affine)
    assert formats['stem'] == ((AFFINE, 8), [8])
    assert formats['conv'] == ((LOG_AFFINE, 4), [4, 4])
    assert formats['out'] == ((AFFINE, 8), [8, 8])
    assert formats['pointwise'] == ((AFFINE, 4), [4])


def test_not_finite_weights_are_named(toy, image):
    with torch.no_grad():
        toy.pointwise.weight[0, 0] = float('nan')
    with pytest.raises(PTQError, match='pointwise.weight holds NaN or infinity'):
        prepare_detector(toy, PTQConfig.from_dict(dict(preset='w8a8')), lambda: toy(image))


def test_a_model_without_layers_is_refused(image):
    with pytest.raises(PTQError, match='no convolution or linear layer'):
        prepare_detector(nn.Module(), PTQConfig.from_dict(dict(preset='w8a8')), lambda: None)


def test_a_layer_that_never_runs_is_named(toy, image):
    toy.spare = nn.Conv2d(1, 1, 1)
    structure = prepare_detector(toy, PTQConfig.from_dict(dict(preset='w8a8')), lambda: toy(image))
    spare = next(layer for layer in structure.layers if layer.name == 'spare')
    assert (spare.integer, spare.reason) == (False, 'it never runs in `predict`')
    assert integer_mac_share(structure) == 1.0


@pytest.mark.parametrize('kind', ['faster_rcnn', 'retinanet'])
def test_named_policies_hold_in_nested_heads(kind):
    detector = semi_supervised(kind)
    structure = prepare_detector(
        detector,
        PTQConfig.from_dict(OBSERVE | dict(head='float', first=dict(weights=dict(bits=7)))),
        lambda: predict(detector, tiny_batch(1)),
    )
    heads = [layer for layer in structure.layers if layer.name.startswith('teacher.') and 'head' in layer.name]
    assert heads and not any(layer.integer for layer in heads) and integer_mac_share(structure) < 1
    rest = [layer for layer in structure.layers if layer.name.startswith('teacher.') and layer not in heads]
    assert {layer.weight['bits'] for layer in rest} == {7, 8}
    assert next(layer for layer in rest if layer.weight['bits'] == 7).name == 'teacher.backbone.conv1'


def test_the_output_layers_of_nested_heads_are_found():
    detector = semi_supervised('retinanet')
    structure = prepare_detector(
        detector, PTQConfig.from_dict(OBSERVE | dict(last='float')), lambda: predict(detector, tiny_batch(1))
    )
    float_layers = {layer.name for layer in structure.layers if layer.inputs == [] or not layer.integer}
    assert {name for name in float_layers if name.startswith('teacher.')} == {
        'teacher.bbox_head.retina_cls',
        'teacher.bbox_head.retina_reg',
    }


def _compiled(conv):
    conv.compile()
    return conv


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (torch.jit.script, 'is a TorchScript module.*build it as a Python module'),
        (torch.compile, 'is compiled.*compile after quantization'),
        (_compiled, 'is compiled.*compile after quantization'),
    ],
)
def test_layers_that_nobody_can_replace_are_refused(changed, message):
    detector = tiny_detector('retinanet')
    detector.bbox_head.retina_cls = changed(detector.bbox_head.retina_cls)
    with pytest.raises(PTQError, match=f'bbox_head.retina_cls {message}'):
        prepare_detector(detector, PTQConfig.from_dict({}), lambda: predict(detector, tiny_batch(1)))
