import math

import pytest
import torch
import torch.nn.functional as F
from dataflow_toys import outputs_of, sites_in, toy
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping.watching.channel_ranges import MOST_LOST_BITS, ChannelRanges, channel_ranges

AUTO = dict(dataflow='auto')


def ranges(*pairs):
    low, high = torch.tensor(pairs).T
    return ChannelRanges(low, high)


@pytest.mark.parametrize(
    'found, bits',
    [
        (ranges((0.0, 1.0), (0.0, 1.0)), 0),
        (ranges((-1.0, 1.0), (0.0, 1.0)), 0.5 * math.log2((1 + 4) / 2)),
        (ranges((0.0, 4.0), (0.0, 1.0)), 0.5 * math.log2((1 + 16) / 2)),
        (ranges((0.0, 1e6), (0.0, 1.0)), 0.5 * math.log2((1 + 255**2) / 2)),  # lost is lost
        (ranges((0.0, 4.0), (0.0, 0.0), (0.0, 1.0)), 0.5 * math.log2((1 + 16) / 2)),  # dead channels do not count
        (ranges((0.0, 0.0), (0.0, 0.0)), 0),
    ],
)
def test_lost_bits(found, bits):
    assert found.lost_bits() == pytest.approx(bits)
    assert found.uneven == (bits > MOST_LOST_BITS)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0.01, 100))
def test_lost_bits_do_not_depend_on_the_unit(widths, unit):
    one, other = (ChannelRanges(torch.zeros(len(widths)), torch.tensor(widths) * factor) for factor in (1, unit))
    assert one.lost_bits() >= 0 and other.lost_bits() == pytest.approx(one.lost_bits(), abs=1e-3)


def test_ranges_hold_zero_and_join():
    x = torch.tensor([[[[1.0, 2.0]], [[-3.0, -1.0]]]])
    first = ChannelRanges.of(x, 1)
    assert first.low.tolist() == [0, -3] and first.high.tolist() == [2, 0] and not first.positive
    second = first.join(ChannelRanges.of(-x, 1))
    assert second.low.tolist() == [-2, -3] and second.high.tolist() == [2, 3]
    assert ChannelRanges.of(x.abs(), 1).positive


def test_all_calls_of_a_layer_are_measured():
    layer = nn.Conv2d(1, 2, 1, bias=False)
    layer.weight.data = torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)
    detector = nn.Sequential(layer)
    inputs, outputs = channel_ranges(
        detector, ['0'], lambda: [detector(torch.full((1, 1, 2, 2), float(v))) for v in (1, 3)], lambda module: 1
    )
    assert inputs['0'].high.tolist() == [3] and inputs['0'].low.tolist() == [0]
    assert outputs['0'].low.tolist() == [0, -6] and outputs['0'].high.tolist() == [3, 0]
    assert not layer._forward_hooks


def test_a_layer_may_be_called_by_keyword():
    layer = nn.Conv2d(2, 3, 1)
    net = nn.ModuleDict(dict(layer=layer))
    by_place, by_name = (
        channel_ranges(net, ['layer'], run, lambda module: 1)
        for run in (lambda: layer(torch.ones(1, 2, 4, 4)), lambda: layer(input=torch.ones(1, 2, 4, 4)))
    )
    for found, expected in zip(by_name, by_place, strict=True):
        assert torch.equal(found['layer'].high, expected['layer'].high)


class Scaled(nn.Module):
    """Channels of very different ranges."""

    def __init__(self, factors):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.conv.weight.data = torch.diag(torch.tensor(factors)).reshape(4, 4, 1, 1)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize('factors, uneven', [((1.0, 1.0, 1.0, 1.0), False), ((40.0, 1.0, 1.0, 1.0), True)])
def test_auto_keeps_scales_per_channel_where_channels_differ(factors, uneven):
    _, structure, _ = toy(lambda self, a, b: F.silu(self.scaled(a.sigmoid())) + b, AUTO, scaled=Scaled(factors))
    (name,) = outputs_of(structure)['scaled.conv']
    assert (structure.activations[name]['spec']['num_channels'] == 4) == uneven
    gates = [site['gate'] for site in structure.sites if site['function'] == 'silu']
    assert [gate is None for gate in gates] == [uneven]
    assert {(i['operation'], i['reason']) for i in structure.islands} == (
        {('silu', 'its input has a scale per channel')} if uneven else set()
    )


@pytest.mark.parametrize(
    'act, factors, channels',
    [
        (F.silu, (1.0, 1.0, 1.0, 1.0), None),  # even: one scale
        (F.silu, (40.0, 1.0, 1.0, 1.0), 4),
        (F.relu, (1.0, 1.0, 1.0, 1.0), 4),  # one zero point: the scales cost nothing
        (F.relu, (40.0, 1.0, 1.0, 1.0), 4),
    ],
)
def test_auto_gives_inputs_of_depthwise_convolutions_one_scale_where_channels_are_alike(act, factors, channels):
    _, structure, _ = toy(
        lambda self, a, b: self.depthwise(act(self.scaled(a))),
        AUTO,
        scaled=Scaled(factors),
        depthwise=nn.Conv2d(4, 4, 3, groups=4),
    )
    assert structure.activations['depthwise']['spec']['num_channels'] == channels


def test_auto_leaves_inputs_of_few_bits_their_scales_per_channel():
    few = dict(activations=OBSERVE['activations'] | dict(bits=4))
    _, structure, _ = toy(
        lambda self, a, b: self.depthwise(F.silu(self.scaled(a))),
        AUTO | few,
        scaled=Scaled((1.0, 1.0, 1.0, 1.0)),
        depthwise=nn.Conv2d(4, 4, 3, groups=4),
    )
    assert structure.activations['depthwise']['spec']['num_channels'] == 4


def test_auto_is_full_where_nothing_is_uneven():
    def between(self, a, b):
        return F.silu(a) + F.max_pool2d(b, 3, 1, 1)

    auto, full = toy(between, AUTO)[1], toy(between)[1]
    assert sites_in(auto, '') == sites_in(full, '') and outputs_of(auto) == outputs_of(full)
    assert auto.activations == full.activations
