"""The choice of queries by ``torch.topk``: collected, replaced by another detector's, missed where there is none."""

import pytest
import torch
from torch import nn

from mmdet_ptq.predictions.queries import chooses_queries, chosen_queries

SCORES = torch.tensor([[0.1, 0.9, 0.3, 0.5], [0.8, 0.2, 0.7, 0.6]])
BEST = [[1, 3], [0, 2]]


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr('mmdet_ptq.predictions.queries.announce', lines.append)
    yield lines
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize(
    ('value', 'expected'), [(True, True), (False, False), (None, False), (1, False), (nn.Identity(), False)]
)
def test_a_detector_chooses_queries_where_it_says_so_and_nothing_else(value, expected):
    detector = nn.Module()
    assert not chooses_queries(detector)
    detector.as_two_stage = value
    assert chooses_queries(detector) is expected


def test_choices_are_collected_in_their_order_and_change_nothing(told):
    with chosen_queries(nn.Module(), None) as chosen:
        values, indices = torch.topk(SCORES, 2)
        other = SCORES.topk(1, 0).indices
        SCORES.max(1), SCORES.sort(1)
    assert indices.tolist() == BEST and torch.equal(values, SCORES.gather(1, indices))
    assert [choice.tolist() for choice in chosen] == [BEST, other.tolist()] == [BEST, [[1, 0, 1, 1]]]
    torch.topk(SCORES, 1)
    assert len(chosen) == 2 and told == []


@pytest.mark.parametrize(
    'choose',
    [
        lambda: torch.topk(SCORES, 2),
        lambda: SCORES.topk(2),
        lambda: torch.topk(SCORES, 2, 1),
        lambda: torch.topk(input=SCORES, k=2, dim=-1),
    ],
)
def test_given_choices_take_the_place_of_the_own_ones(told, choose):
    given, own = torch.tensor([[0, 2], [3, 3]]), []
    with chosen_queries(nn.Module(), [given], own) as chosen:
        values, indices = choose()
    assert indices is given and torch.equal(values, SCORES.gather(1, given))
    assert [choice.tolist() for choice in own] == [BEST] and chosen == [given] and told == []


def test_given_choices_hold_along_the_axis_that_is_chosen_from(told):
    given = [torch.tensor([[1, 0, 0, 1]]), torch.tensor([[3], [0]])]
    with chosen_queries(nn.Module(), given):
        first = SCORES.topk(1, 0)
        second = torch.topk(SCORES, 1, dim=1)
    assert first.values.tolist() == SCORES.gather(0, given[0]).tolist() and first.indices is given[0]
    assert second.values.tolist() == SCORES.gather(1, given[1]).tolist() and second.indices is given[1]


def test_gradients_reach_the_scores_of_the_given_queries(told):
    scores = SCORES.clone().requires_grad_()
    with chosen_queries(nn.Module(), [torch.tensor([[0, 2], [1, 3]])]):
        scores.topk(2).values.sum().backward()
    assert scores.grad.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


def test_a_detector_that_chooses_in_another_way_is_told_once(told):
    with chosen_queries(nn.Linear(1, 1), None):
        SCORES.argsort(1)
    assert len(told) == 1 and told[0].startswith('Linear chooses its queries in another way than by their scores')
    with pytest.raises(KeyError), chosen_queries(nn.Linear(1, 1), None):
        raise KeyError
    assert len(told) == 1
