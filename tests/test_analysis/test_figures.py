"""Figures of a run: which are numbers, how they differ, and which one stands for the run."""

import math
from fractions import Fraction

import numpy as np
import pytest

from mmdet_ptq.analysis.figures import MARK, headline_metric, metric_value, model_name, points


@pytest.mark.parametrize('value', [0, 0.0, 1, 0.375, -2.5, np.float32(0.375), np.int64(3), Fraction(3, 8)])
def test_numbers_are_figures(value):
    found = metric_value(value)
    assert type(found) is float and found == value


@pytest.mark.parametrize(
    'value', [True, False, None, '0.3', math.nan, math.inf, -math.inf, -1, -1.0, [0.3], np.bool_(1)]
)
def test_what_is_no_number_or_stands_for_none_is_no_figure(value):
    assert metric_value(value) is None


@pytest.mark.parametrize(
    ('reference', 'value', 'expected'),
    [
        (0.5, 0.25, -25),
        (0.25, 0.5, 25),
        (1.0, 0.0, -100),  # both ends are shares
        (0.0, 0.0, 0),
        (40.0, 0.5, -39.5),  # a share beside a figure in points is a figure in points
        (0.5, 40.0, 39.5),
        (-1.5, -1.0, 0.5),
    ],
)
def test_differences_are_in_points(reference, value, expected):
    assert points(reference, value) == expected


@pytest.mark.parametrize(
    ('metrics', 'expected'),
    [
        (dict(PQ=0.1, AP=0.2, mAP=0.3), 'mAP'),
        (dict(PQ=0.1, AP=0.2), 'AP'),
        (dict(other=0.4, PQ=0.1), 'PQ'),
        (dict(first_mAP=0.1, mAP=0.2), 'first_mAP'),
        (dict(mAP=-1, AP=math.nan, PQ=True, recall=0.2), 'recall'),
        (dict(mAP_s=0.1, mAP_m=0.2), 'mAP_s'),
    ],
)
def test_the_most_telling_name_with_a_number_stands_for_the_run(metrics, expected):
    # of the first row, which is the float detector's
    assert headline_metric(dict(rows=[dict(metrics=metrics), dict(metrics=dict(mAP=1.0))])) == expected


def test_a_model_is_marked_where_its_figures_are_wrong_here():
    assert model_name(dict(model='onnxruntime', remark='saturates')) == f'onnxruntime{MARK}'
    for row in (dict(remark=''), dict(remark=None), {}):
        assert model_name(dict(row, model='onnxruntime')) == 'onnxruntime'
