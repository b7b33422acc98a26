"""The Fisher weights of reconstruction units."""

from __future__ import annotations

import itertools

import torch

from mmdet_ptq.calibration import fisher
from mmdet_ptq.calibration.reconstruction import unit_fisher
from mmdet_ptq.calibration.reconstruction.units import Unit
from mmdet_ptq.predictions import AlignedPredictions


class OneUnit(torch.nn.Module):
    """A detector of one unit, its outputs its class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = torch.nn.Identity()


def test_weights_are_the_mean_over_draws(monkeypatch):
    detector, sizes = OneUnit(), itertools.count(1)
    monkeypatch.setattr(
        unit_fisher,
        'predict_aligned',
        lambda detector, images, samples, reference: AlignedPredictions(
            detector.unit(images).square().flatten(2).transpose(1, 2).contiguous()
        ),
    )
    monkeypatch.setattr(fisher, '_signs', lambda like: torch.full_like(like, next(sizes)))
    images = torch.rand(2, 3, 4, 5) + 0.5
    weights = unit_fisher.fisher_weights(detector, [Unit('unit', {}, 1)], dict(inputs=images, data_samples=[]), None)
    draws = next(sizes) - 1
    assert draws == unit_fisher.DRAWS > 1
    p = images.square().sigmoid()
    expected = sum(size**2 for size in range(1, draws + 1)) / draws * (2 * images).square() * p * (1 - p)
    torch.testing.assert_close(weights['unit', 0].positions, expected.mean(1, keepdim=True))
    torch.testing.assert_close(weights['unit', 0].channels, expected.mean((0, 2, 3)))
