"""A detector runs as a class of mmdet's where it has that class's raw forward, whoever it inherits from."""

import pytest
from torch import nn

from mmdet_ptq.predictions.stock import runs_as


class Stock(nn.Module):
    def _forward(self, x):
        return x

    def predict(self, x):
        return x


class Heir(Stock):
    """Another prediction, and the raw forward of the stock detector."""

    def predict(self, x):
        return -x


class Own(Stock):
    def _forward(self, x):
        return super()._forward(x)


class HeirOfOwn(Own):
    pass


class Back(Own):
    _forward = Stock._forward


class Stranger(nn.Module):
    _forward = Stock._forward


@pytest.mark.parametrize('kind', [Stock, Heir, Back])
def test_who_has_the_raw_forward_runs_as_the_class(kind):
    assert runs_as(kind(), Stock)


@pytest.mark.parametrize('kind', [Own, HeirOfOwn, Stranger])
def test_who_has_one_of_its_own_or_comes_from_elsewhere_does_not(kind):
    assert not runs_as(kind(), Stock)


def test_a_class_between_counts_as_the_one_that_was_asked_for():
    assert runs_as(HeirOfOwn(), Own) and runs_as(Heir(), Heir) and not runs_as(Stock(), Heir)
