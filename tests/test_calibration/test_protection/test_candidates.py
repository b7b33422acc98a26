"""Formats that may stand in for a tensor's: which are offered, what range they get, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_formats import Toy, config, copies, image_batches, outputs, prepared, run_one, tensor_set

from mmdet_ptq.calibration.protection.candidates import (
    Candidate,
    candidates_for,
    format_label,
    observe_candidates,
    present,
    put_in,
    weight_policies,
)
from mmdet_ptq.calibration.protection.sensitivity import ACTIVATION, WEIGHT, TensorSet
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import Quantizer
from mmdet_ptq.wrapping import Structure, float_weight, quantization_mode, quantized_weights

KINDS = ('per_channel', 'range', 'format', '8bit', '16bit', 'lower', 'float')
LOG = dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer', mode='log1p'))


@pytest.fixture(scope='module')
def made() -> tuple[Toy, Structure]:
    return prepared(config())


def offered(made: tuple[Toy, Structure], tensors: TensorSet, kinds=KINDS, cfg=None) -> list[Candidate]:
    detector, structure = made
    policies = weight_policies(detector, structure, cfg or config(), lambda: run_one(detector))
    return candidates_for(detector, structure, tensors, kinds, policies)


def state(detector: Toy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in detector.state_dict().items()}


def same(detector: Toy, before: dict[str, torch.Tensor]) -> bool:
    after = detector.state_dict()
    return after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())


def read_by(detector: Toy, layer: str) -> torch.Tensor:
    """What a layer reads of the calibration images, in float."""
    seen = []
    handle = detector.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=True)
    with torch.no_grad(), quantization_mode(detector, 'float'):
        for batch in image_batches():
            detector(**batch)
    handle.remove()
    return torch.cat(seen)


# ------------------------------------------------------------------ what is offered


@pytest.mark.parametrize(
    'activations, layer, expected',
    [
        ({}, 'stem', ['range', 'range', 'range', '16bit', 'lower', 'float']),
        ({}, 'depthwise', ['per_channel', 'range', 'range', 'range', '16bit', 'lower', 'float']),
        (dict(depthwise_per_channel=True), 'depthwise', ['range', 'range', 'range', '16bit', 'lower', 'float']),
        (dict(bits=4), 'stem', ['range', 'range', 'range', '8bit', '16bit', 'float']),
        (dict(bits=16), 'stem', ['range', 'range', 'range', 'lower', 'float']),
    ],
)
def test_activations_are_offered_what_they_do_not_have(activations, layer, expected):
    made = prepared(config(activations=activations))
    assert [c.kind for c in offered(made, tensor_set(made[1], ACTIVATION, layer))] == expected


@pytest.mark.parametrize(
    'weights, expected',
    [
        (dict(bits=4), {'format': '4-bit log-affine', 'range': '4-bit affine, min-max range', '8bit': '8-bit affine'}),
        (dict(bits=8), {'format': '8-bit log-affine', 'range': '8-bit affine, min-max range', 'lower': '4-bit affine'}),
        (LOG, {'format': '8-bit affine', 'lower': '4-bit log-affine'}),
        (
            dict(bits=4, observer=dict(type='mmdet_ptq.MinMaxObserver')),
            {'format': '4-bit log-affine', '8bit': '8-bit affine'},
        ),
    ],
    ids=['4 bits', '8 bits', 'log', 'min-max'],
)
def test_weights_are_offered_what_they_do_not_have(weights, expected):
    cfg = config(weights=weights)
    made = prepared(cfg)
    found = offered(made, tensor_set(made[1], WEIGHT, 'two'), cfg=cfg)
    assert {c.kind: c.label for c in found} == {**expected, 'float': 'float'}


def test_only_what_is_asked_for_is_built(made):
    tensors = tensor_set(made[1], ACTIVATION, 'depthwise')
    assert [c.kind for c in offered(made, tensors, ['float', 'per_channel'])] == ['per_channel', 'float']
    assert offered(made, tensors, []) == offered(made, tensors, ['format']) == []


def test_what_is_said_of_a_layer_is_said_of_its_candidates():
    cfg = config(overrides={'two': dict(weights=dict(bits=5)), 'one': 'float'})
    detector, structure = prepared(cfg)
    policies = weight_policies(detector, structure, cfg, lambda: run_one(detector))
    assert policies['two'].bits == 5 and policies['one'].float and policies['stem'].bits == 8
    assert set(policies) == {layer.name for layer in structure.layers}
    assert detector.ptq.mode == 'quantize'
    found = offered((detector, structure), tensor_set(structure, WEIGHT, 'two'), ['format', '8bit', 'lower'], cfg)
    assert [c.label for c in found] == ['5-bit log-affine', '8-bit affine', '4-bit affine']


@pytest.mark.parametrize(
    'spec, observer, label',
    [
        (dict(type='mmdet_ptq.AffineQuantizer', bits=8, num_channels=None), None, '8-bit affine'),
        (dict(type='mmdet_ptq.AffineQuantizer', bits=8, num_channels=4), None, '8-bit affine'),
        (
            dict(type='mmdet_ptq.AffineQuantizer', bits=16, num_channels=4, channel_axis=1),
            dict(type='mmdet_ptq.MSEObserver'),
            '16-bit affine per channel, MSE range',
        ),
        (
            dict(type='mmdet_ptq.AffineQuantizer', bits=8, num_channels=None),
            dict(type='mine.OwnObserver'),
            '8-bit affine, OwnObserver',
        ),
    ],
)
def test_formats_in_words(spec, observer, label):
    assert format_label(spec, observer) == label


def test_the_present_format_is_the_detectors_own(made):
    detector, structure = made
    tensors = tensor_set(structure, ACTIVATION, 'one')
    now = present(detector, structure, tensors)
    (name,) = tensors.tensors
    assert now.label == '8-bit affine, min-max range' and now.kind == 'now' and not now.is_float
    assert now.quantizers[name] is detector.ptq.activations[name]
    assert now.specs(tensors) == {(ACTIVATION, name): structure.activations[name].spec}
    weight = tensor_set(structure, WEIGHT, 'one')
    now = present(detector, structure, weight)
    assert now.quantizers == {'one': quantized_weights(detector)['one'].quantizer} and now.label == '8-bit affine'
    gone = Candidate('float', 'float', {}, {'one': None})
    assert gone.is_float and gone.specs(weight) == {(WEIGHT, 'one'): None}


# ------------------------------------------------------------------ weights


def test_candidates_for_weights_fit_the_float_weight(made):
    detector, structure = made
    weight = float_weight(detector.two).detach()
    rows = weight.reshape(len(weight), -1)
    quantizer = {c.kind: c.quantizers['two'] for c in offered(made, tensor_set(structure, WEIGHT, 'two'))}
    with torch.no_grad():
        errors = {kind: float((q(rows) - rows).square().mean()) for kind, q in quantizer.items() if q is not None}
    assert errors['lower'] > 50 * errors['range'] and quantizer['float'] is None
    # a symmetric range ends at each channel's largest weight
    step = rows.abs().amax(1).numpy() / 127
    found = quantizer['range'](rows).detach().numpy()
    np.testing.assert_allclose(found, np.round(rows.numpy() / step[:, None]) * step[:, None], rtol=0.02, atol=2e-3)


# ------------------------------------------------------------------ ranges of activations


def fitted(made, layer: str, kinds, batches=None) -> list[Candidate]:
    found = offered(made, tensor_set(made[1], ACTIVATION, layer), kinds)
    observe_candidates(made[0], image_batches() if batches is None else batches, found)
    return found


def scales(quantizer: Quantizer) -> np.ndarray:
    return quantizer.positive_scale().detach().numpy()


def test_ranges_are_those_of_what_the_layer_reads(made):
    x = read_by(made[0], 'depthwise').numpy()
    per_channel, wide, low = fitted(made, 'depthwise', ['per_channel', '16bit', 'lower'])
    name = made[1].layers[1].inputs[0]
    assert x.min() == 0  # behind a ReLU
    np.testing.assert_allclose(scales(wide.quantizers[name]), x.max() / 65535, rtol=1e-3)
    np.testing.assert_allclose(scales(low.quantizers[name]), x.max() / 15, rtol=1e-3)
    np.testing.assert_allclose(scales(per_channel.quantizers[name]), x.max(axis=(0, 2, 3)) / 255, rtol=1e-3)
    assert low.observers[name] == {'type': 'mmdet_ptq.MinMaxObserver'}


def test_another_observer_cuts_off_what_is_rare(made):
    (name,) = tensor_set(made[1], ACTIVATION, 'stem').tensors
    batches = [dict(each, inputs=torch.randn(2, 3, 64, 64)) for each in image_batches()]
    batches[0]['inputs'][0, 0, 0, 0] = 1000
    found = {c.label: scales(c.quantizers[name]) for c in fitted(made, 'stem', ['range', '16bit'], batches)}
    assert found['16-bit affine, min-max range'] * 65535 > 1000
    assert found['8-bit affine, percentile range'] * 255 < 100


def test_nothing_of_the_detector_changes(made):
    detector, structure = copies(made)
    before, shown = state(detector), outputs(detector)
    candidates = [
        candidate
        for kind in (ACTIVATION, WEIGHT)
        for layer in ('stem', 'depthwise', 'one')
        for candidate in offered((detector, structure), tensor_set(structure, kind, layer))
    ]
    observe_candidates(detector, image_batches(), candidates)
    assert same(detector, before) and torch.equal(outputs(detector), shown) and structure == made[1]
    assert detector.ptq.only is None and detector.ptq.observers == {} and detector.ptq.mode == 'quantize'


def test_an_interruption_leaves_nothing_behind(made):
    detector, structure = copies(made)
    found = offered((detector, structure), tensor_set(structure, ACTIVATION, 'stem'), ['16bit'])

    def batches():
        yield image_batches()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe_candidates(detector, batches(), found)
    assert detector.ptq.only is None and detector.ptq.observers == {} and detector.ptq.mode == 'quantize'


def test_without_a_batch_the_activation_is_named(made):
    found = offered(made, tensor_set(made[1], ACTIVATION, 'stem'), ['16bit'])
    with pytest.raises(PTQError, match='^activation stem: .* before it saw any data'):
        observe_candidates(made[0], [], found)


def test_weights_alone_need_no_pass(made):
    found = offered(made, tensor_set(made[1], WEIGHT, 'stem'))
    observe_candidates(made[0], (pytest.fail('a batch was read') for _ in range(1)), found)


# ------------------------------------------------------------------ in the detector


@pytest.mark.parametrize('kind, layer', [(ACTIVATION, 'one'), (WEIGHT, 'one')])
def test_a_candidate_is_put_in_and_taken_out_again(made, kind, layer):
    detector, structure = copies(made)
    tensors, shown = tensor_set(structure, kind, layer), outputs(detector)
    now = present(detector, structure, tensors)
    (low,) = offered((detector, structure), tensors, ['lower'])
    observe_candidates(detector, image_batches(), [low])
    put_in(detector, tensors, low)
    with quantization_mode(detector, 'float'):
        exact = outputs(detector)
    changed = outputs(detector)
    assert (changed - exact).square().mean() > (shown - exact).square().mean()
    put_in(detector, tensors, now)
    assert torch.equal(outputs(detector), shown)


def test_a_float_candidate_is_not_put_in(made):
    detector, structure = copies(made)
    before = state(detector)
    for kind in (ACTIVATION, WEIGHT):
        tensors = tensor_set(structure, kind, 'one')
        (gone,) = offered((detector, structure), tensors, ['float'])
        put_in(detector, tensors, gone)
    assert same(detector, before)
