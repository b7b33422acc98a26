import pytest
import torch
import torch.nn.functional as F
from dataflow_toys import outputs_of, sites_in, toy
from torch import nn

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.quantizers import observers
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping.preparing import choose_scales

BALANCED = dict(dataflow='balanced')


class Scaled(nn.Module):
    """Channels of very different ranges."""

    def __init__(self, factors, kernel=3):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, kernel, padding=kernel // 2, bias=False)
        self.conv.weight.data.zero_()
        self.conv.weight.data[:, :, kernel // 2, kernel // 2] = torch.diag(torch.tensor(factors))

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize('factors, uneven', [((1.0, 1.0, 1.0, 1.0), False), ((40.0, 1.0, 1.0, 1.0), True)])
def test_balanced_keeps_scales_per_channel_where_channels_differ(factors, uneven):
    _, structure, _ = toy(lambda self, a, b: F.silu(self.scaled(a.sigmoid())) + b, BALANCED, scaled=Scaled(factors))
    (name,) = outputs_of(structure)['scaled.conv']
    assert (structure.activations[name].spec['num_channels'] == 4) == uneven
    gates = [site['gate'] for site in structure.sites if site['function'] == 'silu']
    assert [gate is None for gate in gates] == [uneven]
    assert {(i['operation'], i['reason']) for i in structure.islands} == (
        {('silu', 'its input has a scale per channel')} if uneven else set()
    )


@pytest.mark.parametrize('share, ends_in_float', [(0, True), (1e3, False)])
@pytest.mark.parametrize('act', [F.silu, F.hardswish])
def test_balanced_keeps_sums_of_pointwise_convolutions_float_where_one_scale_costs_too_much(
    monkeypatch, act, share, ends_in_float
):
    monkeypatch.setattr(choose_scales, 'SHARE', share)
    _, structure, _ = toy(
        lambda self, a, b: act(self.scaled(a.sigmoid())) + b, BALANCED, scaled=Scaled((40.0, 1.0, 1.0, 1.0), kernel=1)
    )
    assert (not outputs_of(structure)['scaled.conv']) == ends_in_float
    reasons = {(i['operation'], i['reason']) for i in structure.islands}
    assert reasons == ({(act.__name__, 'a matrix product hands it floats')} if ends_in_float else set())


@pytest.mark.parametrize('dataflow, outputs', [('accuracy', 0), ('speed', 1)])
def test_sums_of_pointwise_convolutions_stay_float_for_accuracy_alone(dataflow, outputs):
    _, structure, _ = toy(
        lambda self, a, b: F.silu(self.scaled(a.sigmoid())) + b,
        dict(dataflow=dataflow),
        scaled=Scaled((1.0, 1.0, 1.0, 1.0), kernel=1),
    )
    assert len(outputs_of(structure)['scaled.conv']) == outputs


@pytest.mark.parametrize(
    'act, factors, channels',
    [
        (F.silu, (1.0, 1.0, 1.0, 1.0), None),  # even: one scale
        (F.silu, (40.0, 1.0, 1.0, 1.0), 4),
        (F.relu, (1.0, 1.0, 1.0, 1.0), 4),  # one zero point: the scales cost nothing
        (F.relu, (40.0, 1.0, 1.0, 1.0), 4),
    ],
)
def test_balanced_gives_inputs_of_depthwise_convolutions_one_scale_where_channels_are_alike(act, factors, channels):
    _, structure, _ = toy(
        lambda self, a, b: self.depthwise(act(self.scaled(a))),
        BALANCED,
        scaled=Scaled(factors),
        depthwise=nn.Conv2d(4, 4, 3, groups=4),
    )
    assert structure.activations['depthwise'].spec['num_channels'] == channels


@pytest.mark.parametrize('act, channels', [(F.silu, None), (F.relu, 4), (lambda x: x, 4), (F.leaky_relu, None)])
def test_speed_keeps_scales_per_channel_where_the_layer_before_takes_them_over(act, channels):
    _, structure, _ = toy(
        lambda self, a, b: self.depthwise(act(self.scaled(a))),
        scaled=Scaled((40.0, 1.0, 1.0, 1.0)),
        depthwise=nn.Conv2d(4, 4, 3, groups=4),
    )
    assert structure.activations['depthwise'].spec['num_channels'] == channels


def test_balanced_gives_one_zero_point_where_one_scale_costs_too_much(monkeypatch):
    def spec_of(share):
        torch.manual_seed(0)
        monkeypatch.setattr(choose_scales, 'SHARE', share)
        _, structure, _ = toy(
            lambda self, a, b: self.depthwise(F.silu(self.scaled(a))),
            BALANCED,
            scaled=Scaled((40.0, 30.0, 1.0, 1.0)),
            depthwise=nn.Conv2d(4, 4, 3, groups=4),
        )
        return structure.activations['depthwise'].spec

    kinds = [(spec['num_channels'], spec.get('shared_zero_point', False)) for spec in map(spec_of, (0, 0.25, 1e3))]
    assert kinds == [(4, False), (4, True), (None, False)]


def test_balanced_spends_where_one_scale_saves_most_time(monkeypatch):
    # enough for either of two tensors, and not for both
    monkeypatch.setattr(choose_scales, 'SHARE', 0.15)
    # a toy has fewer values than are to speak for a detector
    monkeypatch.setattr(observers, 'EFFECTIVE', 1)

    def per_channel(saved):
        torch.manual_seed(0)
        monkeypatch.setattr(choose_scales, 'SAVED', dict(gated=1.0, product=1.0, channels=saved, own=1.0))
        _, structure, _ = toy(
            lambda self, a, b: self.depthwise(F.silu(self.scaled(a.sigmoid()))),
            BALANCED,
            scaled=Scaled((6.0, 1.0, 1.0, 1.0)),
            depthwise=nn.Conv2d(4, 4, 3, groups=4),
        )
        names = 'depthwise', outputs_of(structure)['scaled.conv'][0]
        return [structure.activations[name].spec['num_channels'] is not None for name in names]

    assert per_channel(1e6) == [False, True]
    assert per_channel(1e-6) == [True, False]


def test_balanced_leaves_inputs_of_few_bits_their_scales_per_channel():
    few = dict(activations=OBSERVE['activations'] | dict(bits=4))
    _, structure, _ = toy(
        lambda self, a, b: self.depthwise(F.silu(self.scaled(a))),
        BALANCED | few,
        scaled=Scaled((1.0, 1.0, 1.0, 1.0)),
        depthwise=nn.Conv2d(4, 4, 3, groups=4),
    )
    assert structure.activations['depthwise'].spec['num_channels'] == 4


def test_balanced_is_speed_where_nothing_is_uneven():
    def between(self, a, b):
        return F.silu(a) + F.max_pool2d(b, 3, 1, 1)

    balanced, speed = toy(between, BALANCED)[1], toy(between)[1]
    assert sites_in(balanced, '') == sites_in(speed, '') and outputs_of(balanced) == outputs_of(speed)
    assert balanced.activations == speed.activations


def between(self, a, b):
    """A depthwise convolution, an addition and a convolution read one tensor."""
    x = F.silu(self.scaled(a))
    return self.depthwise(x) + x + self.dense(x)


def shared(dataflow: str | None, factors: tuple) -> tuple:
    return toy(
        between,
        dict(dataflow=dataflow),
        scaled=Scaled(factors),
        depthwise=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        dense=nn.Conv2d(4, 4, 1),
    )


UNEVEN, EVEN = (100.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    'dataflow, factors, apart',
    [
        (None, EVEN, True),
        ('accuracy', EVEN, True),
        ('speed', UNEVEN, False),
        ('balanced', EVEN, False),
        ('balanced', UNEVEN, True),
    ],
)
def test_depthwise_convolutions_have_a_quantizer_of_their_own_where_it_pays(dataflow, factors, apart):
    detector, structure, image = shared(dataflow, factors)
    inputs = {layer.name: layer.inputs[0] for layer in structure.layers}
    assert (inputs['depthwise'] != inputs['dense']) == apart
    readers = structure.activations[inputs['dense']].readers
    assert readers == (1 if apart else 2)
    channels = structure.activations[inputs['depthwise']].spec['num_channels']
    assert channels == (4 if apart else None)
    if dataflow is not None:
        computed = sites_in(structure, '').get(('silu', 0))
        assert computed == (None if apart else inputs['dense'])
        told = {i['operation'] for i in structure.islands if 'quantizers of their own' in i['reason']}
        assert told == ({'silu'} if apart else set())
    assert torch.isfinite(detector(image)).all()


def test_earlier_names_mean_the_same():
    for name, now in (('auto', 'balanced'), ('full', 'speed'), ('per_channel', 'accuracy')):
        assert PTQConfig.from_dict(dict(preset='w8a8', dataflow=name)).dataflow == now
