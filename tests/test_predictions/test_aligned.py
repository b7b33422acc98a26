import pytest
import torch

from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import AlignedPredictions


def test_confidence_is_the_best_class_times_the_quality():
    logits = torch.tensor([[[0.0, 2.0], [-1.0, -3.0]]])
    quality = torch.tensor([[0.0, 1.0]])
    aligned = AlignedPredictions(cls_logits=logits, quality_logits=quality)
    expected = torch.tensor([2.0, -1.0]).sigmoid() * torch.tensor([0.0, 1.0]).sigmoid()
    torch.testing.assert_close(aligned.confidence(), expected[None])


def test_confidence_of_a_softmax_head_leaves_the_background_out():
    logits = torch.tensor([[[1.0, 0.0, 5.0], [4.0, 0.0, 0.0]]])
    aligned = AlignedPredictions(cls_logits=logits, activation='softmax')
    torch.testing.assert_close(aligned.confidence(), logits.softmax(-1)[..., 0])


def test_take_and_detach_carry_every_part():
    parts = dict(
        cls_logits=torch.randn(2, 5, 3, requires_grad=True),
        boxes=torch.randn(2, 5, 4, requires_grad=True),
        quality_logits=torch.randn(2, 5, requires_grad=True),
        distributions=torch.randn(2, 5, 4, 7, requires_grad=True),
    )
    aligned = AlignedPredictions(**parts, level_sizes=(3, 2))
    index = torch.tensor([[4, 0], [1, 1]])
    taken = aligned.take(index)
    assert taken.level_sizes == (2,)
    for name, value in parts.items():
        for i in range(2):
            assert torch.equal(getattr(taken, name)[i], value[i, index[i]])
        assert getattr(taken, name).requires_grad
        assert not getattr(aligned.detach(), name).requires_grad


def test_detach_reaches_raw_outputs_and_the_first_stage():
    inner = AlignedPredictions(cls_logits=torch.ones(1, 1, 1, requires_grad=True))
    raw = AlignedPredictions(cls_logits=None, raw=[torch.ones(2, requires_grad=True)], proposal_stage=inner).detach()
    assert not raw.raw[0].requires_grad
    assert not raw.proposal_stage.cls_logits.requires_grad


def test_raw_outputs_have_no_confidence():
    with pytest.raises(PTQError, match='align_head.register'):
        AlignedPredictions(cls_logits=None, raw=[]).confidence()
