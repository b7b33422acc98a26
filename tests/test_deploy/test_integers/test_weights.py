"""Weights as integers and a scale: exactly what their codes stand for, in every format."""

import numpy as np
import pytest
import torch

from mmdet_ptq.deploy.integers.weights import IntegerWeight, integer_scale, integer_weight
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer


def fitted(kind, channels, **options):
    axis = dict(channel_axis=0) if kind is AffineQuantizer else {}
    quantizer = kind(num_channels=channels, **axis, **options)
    weight = torch.randn(4, 30) * torch.tensor([[1.0], [0.1], [7.0], [2.0]]) + 0.3
    quantizer.fit_weight(weight)
    return quantizer, quantizer.encode(weight)


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        *((AffineQuantizer, dict(bits=bits, symmetric=True)) for bits in (2, 4, 8)),
        *((AffineQuantizer, dict(bits=bits, symmetric=False)) for bits in (3, 8)),
        (AffineQuantizer, dict(bits=8, symmetric=True, narrow_range=True)),
        *((LogAffineQuantizer, dict(bits=4, location=location)) for location in ('zero', 'median')),
    ],
)
@pytest.mark.parametrize('channels', [4, None])
def test_integers_times_scale_are_what_the_codes_stand_for(kind, options, channels):
    quantizer, codes = fitted(kind, channels, **options)
    weight = integer_weight(quantizer, codes)
    assert torch.equal(weight.values(), quantizer.decode(codes).detach())
    assert weight.integers().dtype == torch.int32 and weight.bits == options['bits']
    assert weight.levels.shape[1] == quantizer.code_range[1] - quantizer.code_range[0] + 1
    # one for each channel, whether the format has one for all or not
    assert weight.scale.shape == (4,) and (channels is not None or weight.scale.unique().numel() == 1)
    torch.testing.assert_close(integer_scale(quantizer).reshape(-1).expand(4), weight.scale, rtol=0, atol=0)


def test_levels_are_looked_up_above_the_lowest_code():
    levels = torch.tensor([[-9, -1, 1, 9], [-5, 0, 0, 5]], dtype=torch.int32)
    codes = torch.tensor([[-2, 1, 0], [1, -1, -2]], dtype=torch.int32)
    weight = IntegerWeight(codes, -2, 2, levels, torch.tensor([0.5, 2.0]))
    assert weight.integers().tolist() == [[-9, 9, 1], [5, 0, -5]]
    assert weight.values().tolist() == [[-4.5, 4.5, 0.5], [10, 0, -10]]
    # a row of levels for the whole layer
    weight.levels = levels[:1]
    assert weight.integers().tolist() == [[-9, 9, 1], [9, -1, -9]]


@pytest.mark.parametrize(('ends', 'fits'), [((-128, 127), True), ((-129, 0), False), ((0, 128), False), ((0, 0), True)])
def test_an_int8_holds_what_it_holds(ends, fits):
    weight = IntegerWeight(torch.zeros(1, 2), 0, 8, torch.tensor([[*ends]], dtype=torch.int32), torch.ones(1))
    assert weight.fits_int8 is fits


def test_stored_levels_stand_for_those_of_this_machine():
    quantizer, codes = fitted(LogAffineQuantizer, 4, bits=3)
    levels, scale = quantizer.integer_levels()
    stored = (levels.int() - 1).to(torch.int8)
    weight = integer_weight(quantizer, codes, stored, scale * 2)
    np.testing.assert_array_equal(weight.integers(), integer_weight(quantizer, codes).integers() - 1)
    assert torch.equal(weight.scale, (scale * 2).reshape(-1).expand(4)) and weight.levels.dtype == torch.int32


def test_the_scale_of_a_weight_is_its_own():
    quantizer, codes = fitted(AffineQuantizer, None, bits=4, symmetric=True)
    weight = integer_weight(quantizer, codes)
    before = quantizer.scale.item()
    weight.scale[0] = 9
    assert quantizer.scale.item() == before and weight.scale[1].item() == before
