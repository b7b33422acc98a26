"""Quantized weights: whoever reads the weight sees the quantized one, computed once in a forward pass."""

import copy

import pytest
import torch
from torch import nn

from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.wrapping.weights import attach_weight, float_weight, freeze_weights, quantized_weights, thaw_weights

LAYERS = {
    'convolution': lambda: nn.Conv2d(4, 6, 3),
    'grouped': lambda: nn.Conv2d(4, 6, 3, groups=2),
    'transposed': lambda: nn.ConvTranspose2d(4, 6, 3),
    'linear': lambda: nn.Linear(4, 6),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def attached(layer, bits=4):
    quantizer = AffineQuantizer(bits=bits, symmetric=True, num_channels=6, channel_axis=0)
    weight = attach_weight(layer, quantizer)
    rows = weight.layout.to_rows(float_weight(layer).detach())
    quantizer.set_range(rows.amin(1), rows.amax(1))
    return weight


def test_the_weight_is_the_quantized_one_and_the_float_one_stays(layer):
    before = layer.weight.detach().clone()
    weight = attached(layer)
    assert torch.equal(float_weight(layer), before) and layer.weight.shape == before.shape
    assert not torch.equal(layer.weight, before)
    rows = weight.layout.to_rows(layer.weight)
    # one scale per output channel, at most 16 levels each
    assert len(rows) == 6 and all(len(row.unique()) <= 16 for row in rows)
    assert torch.equal(weight.quantizer.decode(weight.codes(before)), rows)
    weight.enabled = False
    assert torch.equal(layer.weight, before)


def test_gradients_reach_the_float_weight(layer):
    attached(layer)
    layer.weight.sum().backward()
    assert float_weight(layer).grad.abs().sum() > 0


def test_a_frozen_weight_no_longer_follows_the_float_one(layer):
    attached(layer)
    net = nn.Sequential(layer)
    freeze_weights(net)
    frozen = layer.weight.clone()
    with torch.no_grad():
        float_weight(layer).add_(1)
    assert torch.equal(layer.weight, frozen) and not layer.weight.requires_grad
    thaw_weights(net)
    assert not torch.equal(layer.weight, frozen) and layer.weight.requires_grad


def test_a_frozen_weight_moves_with_its_layer(layer):
    attached(layer)
    freeze_weights(nn.Sequential(layer))
    layer.double()
    assert layer.weight.dtype == torch.float64


def test_inside_a_pass_the_weight_is_computed_once(layer, monkeypatch):
    weight = attached(layer)
    calls, forward = [], AffineQuantizer.forward
    monkeypatch.setattr(AffineQuantizer, 'forward', lambda self, *args: calls.append(1) or forward(self, *args))
    weight.set_caching(True)
    first = layer.weight
    assert layer.weight is first and len(calls) == 1
    weight.set_caching(False)
    assert layer.weight is not first


def test_learned_rounding_settles_into_the_float_weight(layer):
    weight = attached(layer)
    rounding = weight.learn_rounding(float_weight(layer))
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter.copy_(torch.randn_like(parameter) * 5)
    codes = weight.quantizer.encode(weight.layout.to_rows(float_weight(layer).detach()), rounding.hard())
    with torch.no_grad():
        weight.settle_rounding(float_weight(layer))
    assert weight.rounding is None and torch.equal(weight.codes(float_weight(layer)), codes)


def test_settling_changes_no_value_of_the_quantized_weight(layer):
    weight = attached(layer)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        weight.settle(float_weight(layer))
    assert torch.equal(layer.weight, before)
    assert torch.equal(float_weight(layer), before)


def test_a_deep_copy_has_a_weight_of_its_own(layer):
    attached(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        float_weight(twin).mul_(2)
    assert not torch.equal(twin.weight, layer.weight)


def test_quantized_weights_are_found_by_the_names_of_their_layers():
    net = nn.ModuleDict(dict(a=nn.Linear(4, 6), b=nn.Linear(4, 6)))
    weight = attached(net['b'])
    assert quantized_weights(net) == {'b': weight}
