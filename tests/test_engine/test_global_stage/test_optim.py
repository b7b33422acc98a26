"""Every channel learns in units of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdet_ptq.engine.global_stage.optim import build_wrapper, learnable_parameters
from mmdet_ptq.testing import tiny_quantized
from mmdet_ptq.wrapping.weights import float_weight, quantized_weights


@pytest.mark.parametrize('optimizer', ['Adam', 'SGD', 'AdamW'])
def test_a_step_is_as_wide_as_its_unit(optimizer):
    start = torch.tensor([1.0, 1e-3, 0.0, 5.0])
    parameter, unit = nn.Parameter(start.clone()), torch.tensor([1.0, 1e-3, 1e-6, 0.0])
    plain = nn.Parameter(start.clone())
    cfg = dict(type='OptimWrapper', optimizer=dict(type=optimizer, weight_decay=0))
    wrapper = build_wrapper(cfg, [dict(params=[parameter], lr=0.1, unit=unit), dict(params=[plain], lr=0.1)])
    for _ in range(3):
        before = parameter.detach().clone(), plain.detach().clone()
        wrapper.update_params((parameter * torch.tensor([1.0, -2.0, 3.0, 4.0])).sum() + (plain * 2).sum())
        moved = parameter.detach() - before[0]
        scale = torch.tensor([1.0, -2.0, 3.0, 4.0]) if optimizer == 'SGD' else torch.tensor([1.0, -1.0, 1.0, 1.0])
        assert torch.allclose(moved, -0.1 * scale * unit, rtol=1e-3, atol=1e-7)
        assert torch.allclose(plain.detach() - before[1], torch.full((4,), -0.2 if optimizer == 'SGD' else -0.1))


@pytest.mark.parametrize('size', [1e-6, 1.0, 300.0])
def test_late_steps_are_not_lost_in_the_rounding_of_large_values(size):
    parameter = nn.Parameter(torch.full((4,), size))
    wrapper = build_wrapper({}, [dict(params=[parameter], lr=3e-6, unit=torch.full((4,), size))])
    for _ in range(100):
        wrapper.update_params(-parameter.sum() / size)
    assert torch.allclose(parameter / size - 1, torch.full((4,), 3e-4), rtol=0.05)


def test_a_run_of_before_goes_on_with_the_rates_that_it_had():
    parameter = nn.Parameter(torch.ones(2))
    wrapper = build_wrapper({}, [dict(params=[parameter], lr=0.1, unit=torch.full((2,), 1e-3))])
    old = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=0.02)
    wrapper.load_state_dict(old.state_dict())
    wrapper.update_params(parameter.sum())
    assert torch.allclose(parameter, torch.full((2,), 0.98))


def test_units_are_those_of_the_channels():
    detector, _ = tiny_quantized(
        'ssd', dict(preset='w4a4', activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')))
    )
    weights, kinds = quantized_weights(detector), set()
    for name, kind, parameter, unit in learnable_parameters(detector):
        kinds.add(kind)
        assert torch.broadcast_shapes(unit.shape, parameter.shape) == parameter.shape, name
        assert torch.isfinite(unit).all() and (unit >= 0).all()
        if kind == 'scale':
            assert torch.equal(unit, parameter.detach().abs())
        if kind == 'weight':
            layer = name.removesuffix('.weight')
            rows = weights[layer].layout.to_rows(unit)
            # one step a channel, by which the layer's values lie apart
            assert torch.equal(rows.amin(1), rows.amax(1))
            assert torch.allclose(rows.amax(1).mean(), torch.tensor(weights[layer].step_size()), rtol=1e-4)
            assert parameter is float_weight(detector.get_submodule(layer))
    assert {'scale', 'weight', 'bias'} <= kinds
