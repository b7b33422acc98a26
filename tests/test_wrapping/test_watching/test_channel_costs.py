import math

import pytest
import torch
from torch import nn

from mmdet_ptq.wrapping.watching.channel_costs import ChannelCost, channel_costs, not_weighed


def cost_of(x: torch.Tensor, weight: torch.Tensor | None = None) -> ChannelCost:
    cost = ChannelCost(x.shape[1])
    cost.see(x, torch.ones_like(x) if weight is None else weight, 1)
    return cost


def test_cost_is_near_the_squared_error_of_rounding():
    torch.manual_seed(0)
    x = torch.rand(1, 2, 30, 30) * torch.tensor([40.0, 1.0]).reshape(1, 2, 1, 1)
    cost = cost_of(x)
    scales = torch.tensor([40.0, 1.0]).reshape(1, 2, 1, 1) / 255
    together, apart = (float(((x / s).round() * s - x).square().sum()) for s in (scales[:, :1], scales))
    assert cost.together() == pytest.approx(together, rel=0.1)
    assert cost.apart() == pytest.approx(apart, rel=0.1)
    assert cost.elements == x.numel()
    # nothing lies below zero: one zero point serves all channels
    assert cost.one_zero_point() == pytest.approx(cost.apart())


def test_one_zero_point_behind_silu_costs_less_than_one_scale():
    torch.manual_seed(0)
    x = torch.nn.functional.silu(torch.randn(1, 3, 30, 30) * torch.tensor([10.0, 1.0, 1.0]).reshape(1, 3, 1, 1))
    cost = cost_of(x)
    assert 1.05 * cost.apart() < cost.one_zero_point() < 0.95 * cost.together()


def test_channels_that_do_not_matter_cost_nothing_and_lost_ones_their_values():
    x = torch.rand(1, 2, 30, 30) * torch.tensor([1000.0, 1.0]).reshape(1, 2, 1, 1)
    matters = torch.ones_like(x)
    matters[:, 1] = 0
    assert cost_of(x, matters).together() == pytest.approx(cost_of(x, matters).apart(), rel=1e-6)
    faint = torch.cat([x[:, :1], x[:, 1:] * 1e-3], 1)
    only = 1 - matters
    assert cost_of(faint, only).together() == pytest.approx(float(faint[:, 1].square().sum()), rel=1e-3)


def test_all_calls_of_a_layer_are_measured_and_hooks_are_gone():
    layer = nn.Conv2d(1, 2, 1, bias=False)
    layer.weight.data = torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)
    detector = nn.Sequential(layer)
    run = not_weighed(lambda: [detector(torch.full((1, 1, 2, 2), float(v))) for v in (1, 3)])
    inputs, outputs = channel_costs(detector, ['0'], ['0'], run, lambda module: 1)
    assert inputs['0'].high.tolist() == [3] and inputs['0'].low.tolist() == [0]
    assert outputs['0'].low.tolist() == [0, -6] and outputs['0'].high.tolist() == [3, 0]
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    inputs, outputs = channel_costs(detector, ['0'], [], run, lambda module: 1)
    assert list(inputs) == ['0'] and not outputs


def test_a_head_without_regions_is_measured_where_it_has_some():
    layer = nn.Conv2d(1, 2, 1)
    detector = nn.ModuleList([layer])
    nothing, something = torch.zeros(0, 1, 2, 2), torch.ones(1, 1, 2, 2)
    found = [
        channel_costs(detector, ['0'], ['0'], not_weighed(lambda xs=xs: [layer(x) for x in xs]), lambda module: 1)
        for xs in ([nothing], [nothing, something])
    ]
    assert found[0] == ({}, {})
    assert found[1][0]['0'].elements == 4 and found[1][0]['0'].high.tolist() == [1]


def test_a_layer_may_be_called_by_keyword():
    layer = nn.Conv2d(2, 3, 1)
    net = nn.ModuleDict(dict(layer=layer))
    by_place, by_name = (
        channel_costs(net, ['layer'], ['layer'], not_weighed(run), lambda module: 1)
        for run in (lambda: layer(torch.ones(1, 2, 4, 4)), lambda: layer(input=torch.ones(1, 2, 4, 4)))
    )
    for found, expected in zip(by_name, by_place, strict=True):
        assert torch.equal(found['layer'].high, expected['layer'].high)


def test_what_is_written_to_in_place_is_measured_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(inplace=True))
    net[0].weight.data.fill_(-1.0)
    net[0].bias.data.zero_()
    _, outputs = channel_costs(net, [], ['0'], not_weighed(lambda: net(torch.ones(1, 1, 2, 2))), lambda module: 1)
    assert outputs['0'].low.tolist() == [-1]


def test_channels_that_are_all_but_zero_count_a_finite_amount():
    cost = ChannelCost(2)
    cost.see(torch.tensor([[1.0, 2.0, 3.0], [1e-25, -1e-25, 2e-25]]), None, 0)
    assert all(map(math.isfinite, (cost.together(), cost.apart(), cost.one_zero_point())))
