from __future__ import annotations

import numpy as np
import pytest

from mmdet_ptq.datasets.shapes import CLASSES, SHAPES


def _grid(points: int = 401):
    axis = np.linspace(-1.3, 1.3, points)
    return np.meshgrid(axis, axis)


@pytest.mark.parametrize('name', CLASSES)
def test_shape_fills_the_unit_circle_and_stays_in_it(name):
    x, y = _grid()
    inside = SHAPES[name](x, y) <= 0
    radius = np.hypot(x, y)[inside].max()
    assert 0.97 <= radius <= 1.001


@pytest.mark.parametrize('name', CLASSES)
def test_distance_never_changes_faster_than_position(name):
    x, y = _grid()
    distance = SHAPES[name](x, y)
    step = x[0, 1] - x[0, 0]
    assert np.abs(np.diff(distance, axis=0)).max() <= step * 1.001
    assert np.abs(np.diff(distance, axis=1)).max() <= step * 1.001


@pytest.mark.parametrize(
    'name, area',
    [
        ('disk', np.pi),
        ('ring', np.pi * (1 - 0.55**2)),
        ('square', 2.0),
        ('triangle', 0.75 * 3**0.5),
        ('cross', 2 * 1.9 * 0.6 - 0.36),
        ('star', 5 * 0.45 * np.sin(np.pi / 5)),
    ],
)
def test_area_is_the_textbook_one(name, area):
    x, y = _grid(801)
    cell = (x[0, 1] - x[0, 0]) ** 2
    assert (SHAPES[name](x, y) <= 0).sum() * cell == pytest.approx(area, rel=0.01)


def test_no_two_classes_are_the_same():
    x, y = _grid(101)
    masks = {name: SHAPES[name](x, y) <= 0 for name in CLASSES}
    for i, first in enumerate(CLASSES):
        for second in CLASSES[i + 1 :]:
            union = (masks[first] | masks[second]).sum()
            assert (masks[first] & masks[second]).sum() < 0.9 * union, (first, second)
