"""Costs counted by hand, and limits that are kept, broken and told."""

import pytest
from torch import nn

from mmdet_ptq.calibration.protection.budget import Budget, Cost, cost_of
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping import LayerStructure, Structure
from mmdet_ptq.wrapping.structure import ActivationStructure


def affine(bits, channels=None, **options):
    return dict(type='mmdet_ptq.AffineQuantizer', bits=bits, num_channels=channels, symmetric=True, **options)


@pytest.fixture
def structure():
    """A quantized layer, a float one, and what no layer computes."""
    return Structure(
        layers=[
            LayerStructure('a', 'convolution', 'neck', 1000, 30, affine(4, 5), ['x']),
            LayerStructure('b', 'linear', 'head', 100, 10, None, [None]),
        ],
        activations=dict(x=ActivationStructure(affine(8), 1)),
        uncovered=[dict(module='head', operation='conv2d', macs=7, reason='')],
    )


@pytest.fixture
def detector():
    """40 weights as in the layers, and 15 other numbers."""
    return nn.ModuleDict(dict(a=nn.Linear(5, 6, bias=False), b=nn.Linear(2, 5), norm=nn.LayerNorm(5)))


def budget(structure, detector, stored=None, export=(), **protect):
    return Budget(PTQConfig.from_dict(dict(export=list(export), protect=protect)), detector, structure, stored)


# 30 codes of 4 bits and a scale for each of 5 channels; 10 floats; scale and zero point of the activation
SIZE = 15 + 4 * 5 + 4 * 10 + 8
BOPS = 1000 * 4 * 8 + (100 + 7) * 32 * 32


def test_codes_scales_and_operations_by_hand(structure):
    assert cost_of(structure) == Cost(SIZE, BOPS, 107)


@pytest.mark.parametrize(
    ('key', 'spec', 'size', 'bops', 'floats'),
    [
        (('weight', 'a'), None, 120 - 15 - 20, 1000 * 28 * 8, 1000),
        (('weight', 'a'), affine(3, 5), 12 - 15, 1000 * -1 * 8, 0),  # 90 bits are twelve bytes
        (('weight', 'a'), {**affine(4, 5), 'symmetric': False}, 20, 0, 0),  # and zero points
        (('weight', 'a'), dict(bits=4, num_channels=5, mode='log1p', location='zero'), 16 + 20, 0, 0),
        (('weight', 'a'), dict(bits=4, num_channels=5, mode='log1p', location='median'), 20 + 16 + 20, 0, 0),
        (('activation', 'x'), None, -8, 1000 * 4 * 24, 1000),
        (('activation', 'x'), affine(16), 0, 1000 * 4 * 8, 0),
        (('activation', 'x'), affine(8, 3), 16, 0, 0),
        (('weight', 'b'), affine(8, 2), 10 + 8 - 40, 0 + 100 * (8 - 32) * 32, 0),  # its input is float all the same
    ],
)
def test_another_format_changes_what_it_should(structure, key, spec, size, bops, floats):
    change = cost_of(structure, {key: spec}) - cost_of(structure)
    assert change == Cost(size, bops, floats)


def test_factors_that_weights_took_over_are_stored_with_the_activation(structure):
    structure.activations['x'].divided = dict(channels=6, axis=1)
    assert cost_of(structure).size_bytes == SIZE + 4 * 6
    assert cost_of(structure, {('activation', 'x'): None}).size_bytes == SIZE - 8


def test_sixteen_bits_are_float_where_a_runtime_multiplies(structure, detector):
    wide = {('activation', 'x'): affine(16)}
    assert budget(structure, detector).cost(structure, wide).float_macs == 107
    assert budget(structure, detector, export=['onnxruntime']).cost(structure, wide).float_macs == 1107


def test_limits_are_shares_of_the_float_detector(structure, detector):
    made = budget(structure, detector, size_ratio=0.5, bops_ratio=0.25, max_float_macs=0.1)
    assert made.float_size == 4 * 55 and made.float_bops == 32 * 32 * 1107
    # what is float at the start is free
    assert made.limits == dict(
        size_ratio=('size_bytes', 110), bops_ratio=('bops', 256 * 1107), max_float_macs=('float_macs', 0.1 * 1107 + 107)
    )
    assert made.size_limit == 110 and budget(structure, detector).size_limit is None
    # biases and norms are stored beside the weights
    assert made.size_bytes(made.start) == SIZE + 4 * 15
    assert budget(structure, detector, stored=1000).size_bytes(made.start - Cost(50, 0, 0)) == 950


def test_a_limit_is_broken_by_what_exceeds_it(structure, detector):
    made = budget(structure, detector, stored=SIZE, size_bytes=200, bops_ratio=0.5)
    least = Cost(200, int(0.5 * made.float_bops), 107)
    assert made.exceeded(least) == [] and made.allows_float(least)
    made.refuse(least)
    assert made.exceeded(least - Cost(-1, 0, 0)) == ['size_bytes']
    assert made.exceeded(least - Cost(0, -1, -1)) == ['bops_ratio', 'max_float_macs']
    assert not made.allows_float(least - Cost(0, 0, -1))
    # shares of the float detector, and of the limits
    assert made.price(Cost(22, made.float_bops // 4, 9)) == pytest.approx(22 / 220 + 0.25, abs=1e-5)
    saved = made.saving(['size_bytes', 'bops_ratio'], least, least - Cost(50, made.float_bops // 4, 0))
    assert saved == pytest.approx(0.25 + 0.5, abs=1e-5)


def test_what_cannot_be_kept_is_told_with_a_value_that_can(structure, detector):
    for protect in (dict(size_bytes=10), dict(size_ratio=0.1), dict(bops_ratio=0.01)):
        ((key, asked),) = protect.items()
        made = budget(structure, detector, **protect)
        with pytest.raises(PTQError, match=f'`ptq.protect.{key}` = .* cannot be kept: the least that can be') as raised:
            made.refuse(made.start)
        told = str(raised.value).split('reached is ')[1].split(';')[0]
        assert float(told) > asked
        budget(structure, detector, **{key: type(asked)(told)}).refuse(made.start)
