"""A unit is trained by the rates it is given, in no place else, and ends in its best state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from toy_units import Units

from mmdet_ptq.calibration.reconstruction.unit_training import UnitTrainer, devices_of
from mmdet_ptq.wrapping import float_weight, quantization_mode, quantized_weights

NOTHING = dict(
    rounding='nearest', activation_lr=0, weight_scale_lr=0, bias_lr=0, search_scales=False, compensate=False, iters=8
)


@pytest.fixture
def units(tmp_path):
    units = Units(tmp_path)
    with quantization_mode(units.detector, 'quantize'):
        yield units


def trainer(units: Units, name: str = 'middle', taken: set[str] = frozenset(), **cfg) -> UnitTrainer:
    return UnitTrainer(units.data(name, **{**NOTHING, **cfg}), set(taken))


def state(units: Units) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in units.detector.state_dict().items()}


def moved(units: Units, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in units.detector.state_dict().items() if not torch.equal(value, before[name])}


WEIGHT, BIAS = 'middle.parametrizations.weight.original', 'middle.bias'
READ = 'ptq.activations.middle.scale'


@pytest.mark.parametrize(
    'cfg, expected',
    [
        (dict(rounding='latent', weight_lr=0.1, iters=16), {WEIGHT}),
        (dict(rounding='adaround', rounding_lr=0.5), {WEIGHT}),
        (dict(bias_lr=0.01), {BIAS}),
        (dict(activation_lr=0.01), {READ}),
        (dict(weight_scale_lr=0.01), {'middle.parametrizations.weight.0.quantizer.scale'}),
        (dict(bias_lr=0.01, activation_lr=0.01), {BIAS, READ}),
        ({}, set()),
    ],
    ids=lambda value: ' '.join(map(str, value)) if isinstance(value, dict) else '',
)
def test_what_has_a_rate_moves_and_nothing_else(units, cfg, expected):
    before = state(units)
    result = trainer(units, **cfg).run(0)
    assert moved(units, before) == expected
    assert result.outcome == ('trained' if expected else 'restored') and result.name == 'middle'
    assert result.after < result.before if expected else result.after == result.before


def test_the_result_is_the_error_of_the_state_that_is_left(units):
    tried = trainer(units, rounding='latent', weight_lr=0.5, bias_lr=0.01, iters=16)
    before = tried.data.held_out_error()
    result = tried.run(0)
    assert result.before == before and tried.data.held_out_error() == result.after < before


def test_a_seed_gives_the_same_state_and_leaves_the_global_generator(units, tmp_path):
    found, generator = [], torch.get_rng_state()
    start = copy.deepcopy(units.detector.state_dict())
    for seed in (3, 3, 4):
        units.detector.load_state_dict(start)
        trainer(units, bias_lr=0.01, activation_lr=0.01, drop=0.5, input_drop=0.5, batch_size=2).run(seed)
        found.append(state(units))
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(found[0][BIAS], found[1][BIAS]) and not torch.equal(found[0][BIAS], found[2][BIAS])


def test_activations_that_an_earlier_unit_has_trained_stay(units):
    (name,) = trainer(units).activations
    before = state(units)
    tried = trainer(units, taken={name}, activation_lr=0.01, bias_lr=0.01)
    assert tried.activations == {}
    tried.run(0)
    assert moved(units, before) == {BIAS}


def test_a_snapshot_is_a_copy_and_brings_weights_and_ranges_back(units):
    tried, before = trainer(units), state(units)
    kept = tried.snapshot()
    with torch.no_grad():
        float_weight(units.detector.middle).add_(1)
        units.detector.middle.bias.mul_(2)
        next(iter(tried.activations.values())).scale.mul_(3)
    assert moved(units, before) == {WEIGHT, BIAS, READ}
    tried.restore(kept)
    assert moved(units, before) == set()
    # and is none of what it was made from
    with torch.no_grad():
        units.detector.middle.bias.mul_(2)
    tried.restore(kept)
    assert moved(units, before) == set()


@pytest.mark.parametrize('rounding', ['adaround', 'latent'])
def test_an_interruption_leaves_no_trace_of_training(units, rounding, monkeypatch):
    tried = trainer(units, rounding=rounding, drop=0.5, iters=8)
    errors, asked = tried.data.errors, []

    def interrupted(samples, mix):
        asked.append(tried.state.drop)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return errors(samples, mix)

    monkeypatch.setattr(tried.data, 'errors', interrupted)
    with pytest.raises(KeyboardInterrupt):
        tried.run(0)
    # the first look and those between training are without dropped quantization
    assert asked[0] == 0 and 0.5 in asked and tried.state.drop == 0
    assert all(weight.rounding is None and not weight.caching for weight in quantized_weights(units.detector).values())


def test_learned_rounding_chooses_between_the_two_codes_around_a_weight(units):
    weight = quantized_weights(units.detector)['middle']
    original = float_weight(units.detector.middle).detach().clone()
    scale = weight.quantizer.step_sizes().detach().reshape(-1, 1, 1, 1)
    trainer(units, rounding='adaround', rounding_lr=0.5, iters=16).run(0)
    chosen = units.detector.middle.weight.detach() / scale
    below = torch.floor(original / scale)
    inside = (original / scale).abs() < 3  # of three bits, the outermost codes are ends
    assert ((chosen - below).abs() < 1e-3)[inside].logical_or(((chosen - below - 1).abs() < 1e-3)[inside]).all()
    nearest = torch.round(original / scale)
    assert ((chosen - nearest).abs() > 0.5)[inside].any()


def test_the_closed_form_alone_helps_and_draws_nothing(units):
    generator = torch.get_rng_state()
    first = trainer(units, compensate=True, search_scales=True, iters=0)
    result = first.run(0)
    assert result.outcome == 'trained' and result.after < 0.9 * result.before
    assert torch.equal(torch.get_rng_state(), generator)
    # a second time it finds nothing, and whatever it tried is taken back
    before = state(units)
    again = trainer(units, compensate=True, search_scales=True, iters=0).run(1)
    assert again.before == pytest.approx(result.after, rel=1e-5) and again.after <= again.before
    assert again.outcome == 'trained' or moved(units, before) == set()


def test_a_rate_that_is_too_high_ends_where_it_began(units):
    before = state(units)
    result = trainer(units, bias_lr=1e30).run(0)
    assert result.outcome == 'restored' and result.after == result.before and moved(units, before) == set()
    assert math.isfinite(result.after)


@pytest.mark.parametrize(
    'device, kept', [('cpu', []), ('cuda:1', [torch.device('cuda:1')]), ('mps', [torch.device('mps')])]
)
def test_the_generators_of_other_devices_than_the_cpu_are_kept(device, kept):
    assert devices_of(torch.device(device)) == kept
