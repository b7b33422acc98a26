"""Activation scales are chosen by the error of what the unit returns."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdet_ptq.calibration.reconstruction.scale_search import FACTORS, search_scales
from mmdet_ptq.quantizers import AffineQuantizer


class Weight:
    enabled = True


def linear_unit(quantizer, x, weights):
    """A unit that multiplies its quantized input by some weights; what it is asked for is kept."""
    asked = []

    def errors(samples, mix):
        asked.append((samples, [weight.enabled for weight in data.weights.values()]))
        for sample in samples:
            yield ((quantizer(x[sample]) - x[sample]) * weights).square().sum(), x[sample].numel()

    data = SimpleNamespace(train_samples=list(range(len(x))), batch_size=4, weights=dict(a=Weight()), errors=errors)
    return data, asked


@pytest.fixture
def quantizer():
    quantizer = AffineQuantizer(bits=4)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(15.0))
    return quantizer


def test_the_scale_follows_the_values_that_matter(quantizer):
    x = torch.cat([torch.rand(10, 50) * 9, torch.full((10, 1), 15.0)], 1)
    counts_alike, ignores_the_last = torch.ones(51), torch.ones(51)
    ignores_the_last[-1] = 0
    data, _ = linear_unit(quantizer, x, 100 * counts_alike)
    search_scales(data, [quantizer])
    assert quantizer.scale == 1
    data, _ = linear_unit(quantizer, x, ignores_the_last)
    search_scales(data, [quantizer])
    assert quantizer.scale == torch.tensor(0.6)


def test_the_scale_found_has_the_least_error_of_all_that_are_tried(quantizer):
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)).relu() * 4
    data, _ = linear_unit(quantizer, x, torch.ones(40))

    def error(factor):
        tried = AffineQuantizer(bits=4)
        tried.load_state_dict(quantizer.state_dict())
        tried.rescale(torch.tensor(factor))
        return float((tried(x) - x).square().sum())

    best = min((1.0, *FACTORS), key=error)
    search_scales(data, [quantizer])
    assert quantizer.scale == torch.tensor(best)


def test_any_scale_is_better_than_one_that_gives_nan(quantizer):
    x, before = torch.full((4, 5), 12.0), quantizer.scale.clone()

    def errors(samples, mix):
        error = (quantizer(x) - x).square().sum()
        yield error * math.nan if quantizer.scale >= before else error, x.numel()

    data = SimpleNamespace(train_samples=[0], batch_size=4, weights={}, errors=errors)
    search_scales(data, [quantizer])
    assert quantizer.scale < before


def test_weights_are_float_meanwhile_and_few_samples_are_looked_at(quantizer):
    data, asked = linear_unit(quantizer, torch.rand(100, 3), torch.ones(3))
    search_scales(data, [quantizer])
    assert all(enabled == [False] for _, enabled in asked)
    assert data.weights['a'].enabled
    assert {sample for samples, _ in asked for sample in samples} == set(range(0, 100, 4))


def test_a_limit_of_the_quantizer_holds(quantizer):
    quantizer.scale_limit.fill_(1.05)
    data, _ = linear_unit(quantizer, torch.full((4, 5), 15.6), torch.ones(5))
    search_scales(data, [quantizer])
    assert quantizer.positive_scale() <= 1.05


def test_without_activations_nothing_is_asked():
    data, asked = linear_unit(nn.Identity(), torch.rand(4, 2), torch.ones(2))
    search_scales(data, [])
    assert not asked
