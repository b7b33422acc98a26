"""The Fisher weights of reconstruction: expected squared gradients of the detector's own log-likelihood."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmdet_ptq.calibration.reconstruction import fisher
from mmdet_ptq.calibration.reconstruction.fisher import noisy_loss
from mmdet_ptq.calibration.reconstruction.units import Unit
from mmdet_ptq.predictions import AlignedPredictions


def mean_outer_product(predictions: AlignedPredictions, inputs: torch.Tensor, monkeypatch) -> torch.Tensor:
    """Mean of gradient times gradient over every pattern of signs."""
    total, patterns = 0, list(itertools.product((-1.0, 1.0), repeat=inputs.numel()))
    for pattern in patterns:
        monkeypatch.setattr(fisher, '_signs', lambda like, pattern=pattern: torch.tensor(pattern).view(like.shape))
        (gradient,) = torch.autograd.grad(noisy_loss(predictions), inputs, retain_graph=True)
        total = total + torch.outer(gradient.flatten(), gradient.flatten())
    return total / len(patterns)


def test_scores_of_sigmoid_heads_have_the_covariance_of_labels_drawn_from_them(monkeypatch):
    logits = torch.tensor([[[-3.0, 0.5, 2.0], [0.0, -1.0, -6.0]]], requires_grad=True)
    found = mean_outer_product(AlignedPredictions(logits), logits, monkeypatch)
    p = logits.detach().sigmoid().flatten()
    torch.testing.assert_close(found, torch.diag(p * (1 - p)))


def test_scores_of_softmax_heads_have_the_covariance_of_labels_drawn_from_them(monkeypatch):
    logits = torch.tensor([[[-1.0, 0.5, 2.0, 0.1]]], requires_grad=True)
    found = mean_outer_product(AlignedPredictions(logits, activation='softmax'), logits, monkeypatch)
    p = logits.detach().softmax(-1).flatten()
    torch.testing.assert_close(found, torch.diag(p) - torch.outer(p, p))


def test_boxes_have_the_slope_of_their_own_term_at_the_deviation_of_reference():
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 40.0]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(noisy_loss(AlignedPredictions(torch.zeros(1, 1, 2), boxes)), boxes)
    size = torch.tensor([[[10.0, 40.0, 10.0, 40.0]]])
    slope_of_square = gradient.square() * fisher.BOX_DEVIATION * size
    away = (boxes.detach() + fisher.BOX_DEVIATION * size).requires_grad_()
    term = ((away - boxes.detach()) / size).abs().mean()
    torch.testing.assert_close(slope_of_square, torch.autograd.grad(term, away)[0])


class OneUnit(torch.nn.Module):
    """A detector of one unit, its outputs its class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = torch.nn.Identity()


def test_weights_are_the_mean_over_draws(monkeypatch):
    detector, sizes = OneUnit(), itertools.count(1)
    monkeypatch.setattr(
        fisher,
        'predict_aligned',
        lambda detector, images, samples, reference: AlignedPredictions(
            detector.unit(images).square().flatten(2).transpose(1, 2).contiguous()
        ),
    )
    monkeypatch.setattr(fisher, '_signs', lambda like: torch.full_like(like, next(sizes)))
    images = torch.rand(2, 3, 4, 5) + 0.5
    weights = fisher.fisher_weights(detector, [Unit('unit', {}, 1)], dict(inputs=images, data_samples=[]), None)
    draws = next(sizes) - 1
    assert draws == fisher.DRAWS > 1
    p = images.square().sigmoid()
    expected = sum(size**2 for size in range(1, draws + 1)) / draws * (2 * images).square() * p * (1 - p)
    torch.testing.assert_close(weights['unit', 0].positions, expected.mean(1, keepdim=True))
    torch.testing.assert_close(weights['unit', 0].channels, expected.mean((0, 2, 3)))


@pytest.mark.parametrize('quality', [None, torch.full((1, 2), 9.0)])
def test_boxes_that_the_filter_drops_count_nothing(quality):
    logits = torch.tensor([[[-12.0, -13.0], [1.0, -2.0]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(noisy_loss(AlignedPredictions(logits, quality_logits=quality)), logits)
    assert (gradient[0, 0] == 0).all()
    assert (gradient[0, 1] != 0).all()


def test_raw_outputs_count_alike_in_units_of_their_spread():
    raw = torch.randn(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(noisy_loss(AlignedPredictions(None, raw=[raw])), raw)
    torch.testing.assert_close(gradient.abs(), (1 / raw.detach().std()).expand(2, 5))
