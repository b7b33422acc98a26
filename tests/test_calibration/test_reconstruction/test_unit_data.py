"""The error of a unit is that of the whole quantized detector at its outputs, worked out again in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toy_units import Units, batch

from mmdet_ptq.calibration.reconstruction.streams import KeptWeight
from mmdet_ptq.calibration.reconstruction.unit_data import UnitData
from mmdet_ptq.wrapping import quantization_mode


@pytest.fixture
def make(tmp_path):
    """Builds the toy and leaves it quantized."""
    modes = []

    def build(**kwargs) -> Units:
        units = Units(tmp_path, **kwargs)
        modes.append(quantization_mode(units.detector, 'quantize'))
        modes[-1].__enter__()
        return units

    yield build
    for mode in modes:
        mode.__exit__(None, None, None)


def outputs(units: Units, name: str, mode: str) -> list[list[np.ndarray]]:
    """What each call of a layer returns, batch by batch, in a pass of the whole detector."""
    seen = []
    handle = units.detector.get_submodule(name).register_forward_hook(lambda _, args, out: seen[-1].append(out.numpy()))
    with torch.no_grad(), quantization_mode(units.detector, mode):
        for each in units.batches:
            seen.append([])
            units.detector(each['inputs'])
    handle.remove()
    return seen


def variance(maps: np.ndarray) -> float:
    return float(maps.astype(np.float64).var(axis=(0, 2, 3)).mean())


@pytest.mark.parametrize('name', ['stem', 'middle', 'bbox_head'])
def test_the_error_is_the_share_of_the_variance_that_is_noise(make, name):
    units = make(batches=[batch(3, 1)])
    data = units.data(name)
    (float_output,), (quantized,) = (outputs(units, name, mode)[0] for mode in ('float', 'quantize'))
    assert data.variances == pytest.approx([variance(float_output)], rel=1e-4)
    assert data.energy == pytest.approx(variance(float_output) * float_output.shape[1], rel=1e-4)
    expected = float(np.square(quantized - float_output).mean()) / variance(float_output)
    assert 0 < data.held_out_error() == pytest.approx(expected, rel=1e-4)


def test_calls_count_by_their_own_variance_and_their_values(make):
    units = make(batches=[batch(2, 1)], twice=True)
    data = units.data('middle')
    before, after = (outputs(units, 'middle', mode)[0] for mode in ('float', 'quantize'))
    assert [call.shape for call in before] == [(2, 5, 6, 8), (2, 5, 3, 4)]
    assert data.positions() == 6 * 8 + 3 * 4
    variances = [variance(call) for call in before]
    assert data.variances == pytest.approx(variances, rel=1e-4) and variances[0] != pytest.approx(
        variances[1], rel=0.01
    )
    squares = [float(np.square(b - a).sum()) / v for a, b, v in zip(after, before, variances, strict=True)]
    assert data.held_out_error() == pytest.approx(sum(squares) / sum(call.size for call in before), rel=1e-4)
    assert data.energy == pytest.approx(5 * sum(variances) / 2, rel=1e-4)


def test_held_out_images_alone_are_looked_at_and_of_none_all(make):
    units = make()
    chosen = [(0, 1), (2, 0)]
    data = units.data('middle', train=[(1, 0), (1, 1)], held_out=chosen)
    before, after = (outputs(units, 'middle', mode) for mode in ('float', 'quantize'))
    squares = [np.square(after[b][0][i] - before[b][0][i]).mean() for b, i in chosen]
    assert data.held_out_error() == pytest.approx(float(np.mean(squares)) / data.variances[0], rel=1e-4)
    alike = units.data('middle', train=chosen)
    assert alike.held_out == chosen and alike.held_out_error() == pytest.approx(data.held_out_error(), rel=1e-5)


def test_images_of_several_sizes_go_in_groups(make):
    units = make(batches=[batch(2, 1, (6, 8)), batch(1, 2, (4, 4)), batch(1, 3, (6, 8))])
    data = units.data('middle')
    found = list(data.errors([(0, 0), (1, 0), (0, 1), (2, 0)], mix=False))
    assert [numel for _, numel in found] == [3 * 5 * 6 * 8, 5 * 4 * 4]
    before, after = (outputs(units, 'middle', mode) for mode in ('float', 'quantize'))
    squares = [float(np.square(a[0] - b[0]).sum()) for a, b in zip(after, before, strict=True)]
    assert [float(error) * data.variances[0] for error, _ in found] == pytest.approx(
        [squares[0] + squares[2], squares[1]], rel=1e-4
    )
    # the order of samples, and how many are taken at once, is no matter
    one_by_one = units.data('middle', batch_size=1)
    assert one_by_one.batch_size == 1 and one_by_one.held_out_error() == pytest.approx(data.held_out_error(), rel=1e-5)


@pytest.mark.parametrize(
    'cfg, size', [({}, 6), (dict(batch_size=4), 4), (dict(max_positions=100), 2), (dict(max_positions=47), 1)]
)
def test_as_many_images_are_taken_as_fit(make, cfg, size):
    data = make().data('middle', **cfg)
    assert data.positions() == 48 and data.batch_size == size


def test_weights_of_outputs_have_mean_one_and_enter_by_their_share(make):
    units = make(batches=[batch(2, 1), batch(2, 2)], fisher=True)
    plain, half, full = (units.data('middle', fisher=share).held_out_error() for share in (0, 0.5, 1))
    assert half == pytest.approx((plain + full) / 2, rel=1e-4) and full != pytest.approx(plain, rel=1e-3)
    # the same by hand
    kept = [each.fisher['middle', 0] for each in units.streams.batches]
    positions = np.stack([units.streams.store.get(weight.positions).numpy() for weight in kept])
    channels = np.stack([weight.channels.numpy() for weight in kept]).mean(0)
    weights = positions / positions.mean() * (channels / channels.mean()).reshape(1, 1, -1, 1, 1)
    before, after = (np.stack([call[0] for call in outputs(units, 'middle', m)]) for m in ('float', 'quantize'))
    data = units.data('middle')
    assert full == pytest.approx(float((weights * np.square(after - before)).mean()) / data.variances[0], rel=1e-3)


@pytest.mark.parametrize('value', [0.0, math.nan, math.inf])
def test_where_no_gradient_tells_all_outputs_count_alike(make, value):
    units = make(batches=[batch(2, 1)], fisher=True)
    plain = units.data('middle').held_out_error()
    kept = units.streams.batches[0].fisher['middle', 0]
    positions = torch.full_like(units.streams.store.get(kept.positions), value)
    units.streams.batches[0].fisher['middle', 0] = KeptWeight(units.streams.store.put(positions), kept.channels)
    assert units.data('middle', fisher=1).held_out_error() == pytest.approx(plain, rel=1e-6)


def test_inputs_may_be_the_float_detectors(make):
    units = make()
    data = units.data('middle', input_drop=0.999)  # to 1/256, all of them
    samples = data.train_samples
    mixed = [float(error) for error, _ in data.errors(samples, mix=True)]
    clean = UnitData(
        units.streams, data.unit, data.float_inputs, data.float_inputs, data.cfg, data.train_samples, data.held_out
    )
    assert mixed == pytest.approx([float(error) for error, _ in clean.errors(samples, mix=False)], rel=1e-6)
    assert mixed != pytest.approx([float(error) for error, _ in data.errors(samples, mix=False)], rel=1e-3)


def test_constant_outputs_have_a_variance_and_errors_that_are_no_numbers_are_infinite(make):
    units = make()
    with torch.no_grad():
        units.detector.middle.parametrizations.weight.original.zero_()
    data = units.data('middle')
    assert data.variances == [1e-12] and data.energy > 0 and math.isfinite(data.held_out_error())
    with torch.no_grad():
        units.detector.middle.bias[0] = math.nan
    assert data.held_out_error() == math.inf


def test_weights_are_computed_anew_after_each_look_also_one_that_is_broken_off(make):
    units = make(twice=True)
    data = units.data('middle')
    (weight,) = data.weights.values()
    before = data.held_out_error()
    with torch.no_grad():
        units.detector.middle.parametrizations.weight.original.mul_(0.5)
    assert not weight.caching and data.held_out_error() != pytest.approx(before, rel=1e-3)
    looks = data.errors(data.train_samples, mix=False)
    next(looks)
    assert weight.caching
    looks.close()
    assert not weight.caching
