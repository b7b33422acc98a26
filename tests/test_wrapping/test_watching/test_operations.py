"""What functional operations do to quantized tensors, held against the functions themselves."""

from math import inf

import pytest
import torch
import torch.nn.functional as F

from mmdet_ptq.wrapping.watching.operations import (
    ARITHMETIC,
    MOVEMENT,
    UNKNOWN,
    classify,
    clip_bounds,
    clips_at_zero,
    keeps_channels,
    works_in_place,
)

X = torch.randn(2, 4, 6, 6)
MOVEMENTS = [
    (F.max_pool2d, (X, 2), {}),
    (F.interpolate, (X,), dict(scale_factor=2)),
    (torch.cat, ([X, X], 1), {}),
    (F.pad, (X, (1, 1, 1, 1)), {}),
    (torch.Tensor.reshape, (X, 2, -1), {}),
    (F.pixel_shuffle, (X, 2), {}),
    (torch.chunk, (X, 2, 1), {}),
    (torch.Tensor.permute, (X, 0, 2, 3, 1), {}),
    (F.dropout, (X, 0.5, False), {}),
    (torch.Tensor.__getitem__, (X, (slice(None), slice(0, 2))), {}),
]
OTHERS = [
    (F.interpolate, (X,), dict(scale_factor=2, mode='bilinear'), ARITHMETIC),
    (F.relu, (X,), {}, ARITHMETIC),
    (torch.add, (X, X), {}, ARITHMETIC),
    (F.silu, (X,), {}, ARITHMETIC),
    (torch.exp, (X,), {}, UNKNOWN),
    (F.pad, (X, (1, 1, 1, 1)), dict(value=1.0), UNKNOWN),
    (F.dropout, (X, 0.5, True), {}, UNKNOWN),
    (torch.softmax, (X, 1), {}, UNKNOWN),
]


@pytest.mark.parametrize(('func', 'args', 'kwargs'), MOVEMENTS, ids=lambda value: getattr(value, '__name__', ''))
def test_a_movement_gives_back_values_that_it_was_given(func, args, kwargs):
    assert classify(func, func.__name__, args, kwargs) == MOVEMENT
    outputs = func(*args, **kwargs)
    for out in outputs if isinstance(outputs, tuple) else (outputs,):
        assert torch.isin(out, torch.cat([X.flatten(), torch.zeros(1)])).all()


@pytest.mark.parametrize(('func', 'args', 'kwargs', 'kind'), OTHERS, ids=lambda value: getattr(value, '__name__', ''))
def test_what_computes_new_values_is_no_movement(func, args, kwargs, kind):
    assert classify(func, func.__name__, args, kwargs) == kind


@pytest.mark.parametrize(
    ('func', 'args', 'kwargs'),
    [
        (F.relu6, (X,), {}),
        (F.hardtanh, (X,), {}),
        (F.hardtanh, (X, -2.0, 3.0), {}),
        (torch.clamp, (X, 0, 2), {}),
        (torch.clamp, (X,), dict(max=1)),
        (torch.clamp, (X,), dict(min=-0.5)),
        (F.relu, (X,), {}),
    ],
)
def test_the_bounds_of_a_clip_are_those_of_the_function(func, args, kwargs):
    x = torch.linspace(-10, 10, 201)
    low, high = clip_bounds(func.__name__, args, kwargs) if func is not F.relu else (0, inf)
    assert torch.equal(func(x, *args[1:], **kwargs), x.clamp(low, high))
    assert clips_at_zero(func.__name__, args, kwargs) == (low == 0)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'expected'),
    [
        ('add_', {}, True),
        ('add', {}, False),
        ('__iadd__', {}, True),
        ('__index__', {}, False),
        ('__add__', {}, False),
        ('relu', dict(inplace=True), True),
        ('relu', dict(inplace=False), False),
    ],
)
def test_what_overwrites_its_argument_is_told_by_name_and_argument(name, kwargs, expected):
    assert works_in_place(name, kwargs) is expected


def test_a_scale_per_channel_moves_along_only_where_channels_stay():
    assert keeps_channels('max_pool2d') and keeps_channels('interpolate')
    assert not keeps_channels('cat') and not keeps_channels('permute')
