"""Which outputs of a unit matter to the detector: the diagonal Fisher information of its global loss.

The global loss has no gradient at the float detector itself, which is its own target. The Fisher information does: it
is the expected squared gradient of the log-likelihood over labels drawn from the detector's own predictions. A few
backward passes a batch give the weights of every unit at once, where BRECQ and Reg-PTQ run the whole detector for each
unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdet_ptq.calibration.reconstruction.units import Unit
from mmdet_ptq.predictions import AlignedPredictions, predict_aligned

# as in the global loss: theta_C, and how many priors an image counts
SCORE_THR, MAX_BOXES = 2e-4, 1000
# draws of the noise that are averaged
DRAWS = 4
# deviation of a box, in parts of its size, at which the L1 term is matched by a squared one: an IoU of about 0.9
BOX_DEVIATION = 0.05


@dataclass
class FisherWeight:
    """Squared gradients at one call's output, as an outer product: positions of each image times channels.

    Attributes:
        positions: Mean over channels, (N, 1, ...), or (N, ..., 1) where channels come last.
        channels: Mean over everything else, (C,).
    """

    positions: Tensor
    channels: Tensor

    def add(self, other: FisherWeight) -> None:
        """Adds another draw's, in place."""
        self.positions += other.positions
        self.channels += other.channels


def fisher_weights(
    detector: nn.Module, units: Iterable[Unit], data: dict, reference: AlignedPredictions | None
) -> dict[tuple[str, int], FisherWeight]:
    """Measures one batch.

    Args:
        detector: The quantized detector in float mode. Where its parameters require gradients, outputs that do not
            depend on the image (of a transformer's queries) are reached, too.
        units: Its reconstruction units.
        data: A preprocessed batch: ``inputs`` and ``data_samples``.
        reference: The float predictions of a two-stage detector on the batch, else None.

    Returns:
        (unit, call) to its weight, in main memory.
    """
    outputs: dict[tuple[str, int], Tensor] = {}
    counts = Counter()

    def keep(name: str) -> Callable:
        def hook(module, args, output):
            outputs[name, counts[name]] = output
            counts[name] += 1
            # a copy goes on: what follows may write to it
            return output.clone()

        return hook

    axes = {unit.name: unit.axis for unit in units}
    handles = [detector.get_submodule(name).register_forward_hook(keep(name)) for name in axes]
    try:
        with torch.enable_grad():
            images = data['inputs'].detach().clone().requires_grad_()
            predictions = predict_aligned(detector, images, data['data_samples'], reference=reference)
            keys = list(outputs)
            weights = {key: _factors(torch.zeros_like(outputs[key]), axes[key[0]]) for key in keys}
            for draw in range(DRAWS):
                grads = torch.autograd.grad(
                    noisy_loss(predictions),
                    [outputs[key] for key in keys],
                    allow_unused=True,
                    retain_graph=draw < DRAWS - 1,
                )
                for key, grad in zip(keys, grads, strict=True):
                    if grad is not None:
                        weights[key].add(_factors(grad.square(), axes[key[0]]))
    finally:
        for handle in handles:
            handle.remove()
    return weights


def _factors(squares: Tensor, axis: int) -> FisherWeight:
    others = [other for other in range(squares.ndim) if other != axis % squares.ndim]
    return FisherWeight((squares.mean(axis, keepdim=True) / DRAWS).cpu(), (squares.mean(others) / DRAWS).cpu())


def noisy_loss(predictions: AlignedPredictions) -> Tensor:
    """A sum whose squared gradient is, on average, the diagonal Fisher information of the predictions.

    Each output is multiplied by noise with the covariance that the gradient of the log-likelihood has over labels drawn
    from the predictions: p (1 - p) for sigmoid scores and the quality, diag(p) - p p^T for softmax scores. Its size is
    fixed and its sign random: of labels themselves, one of probability 0.001 would be drawn once in a thousand times.
    Boxes, whose L1 term has no curvature of its own, get that of the squared term that touches it from above at a
    deviation d of BOX_DEVIATION: |x| <= x^2 / (2 d) + d / 2, a Fisher information of 1 / d for each coordinate.

    Args:
        predictions: Of the float detector, with gradients.
    """
    if predictions.raw is not None:
        parts = [(t * _signs(t)).sum() / t.detach().std().clamp_min(1e-6) for t in predictions.raw if t.numel() > 1]
        return torch.stack(parts).sum()
    confidence = predictions.confidence().detach()
    best = confidence.topk(min(MAX_BOXES, confidence.shape[1]), dim=1).indices
    kept = predictions.take(best)
    mask = kept.confidence().detach() >= SCORE_THR
    logits = kept.cls_logits[mask]
    loss = (logits * _score_noise(logits.detach(), kept.activation)).sum()
    if kept.quality_logits is not None:
        quality = kept.quality_logits[mask]
        loss = loss + (quality * _score_noise(quality.detach(), 'sigmoid')).sum()
    if kept.boxes is not None:
        boxes = kept.boxes[mask]
        size = (boxes.detach()[:, 2:] - boxes.detach()[:, :2]).clamp(min=1).repeat(1, 2)
        # the term is the mean of the four coordinates
        loss = loss + (boxes / size * _signs(boxes)).sum() * math.sqrt(1 / (4 * BOX_DEVIATION))
    if predictions.proposal_stage is not None:
        loss = loss + noisy_loss(predictions.proposal_stage)
    return loss


def _score_noise(logits: Tensor, activation: str) -> Tensor:
    if activation == 'sigmoid':
        return (logits.sigmoid() * (-logits).sigmoid()).sqrt() * _signs(logits)
    probabilities = logits.softmax(-1)
    noise = probabilities.sqrt() * _signs(logits)
    return noise - probabilities * noise.sum(-1, keepdim=True)


def _signs(like: Tensor) -> Tensor:
    return torch.randint(0, 2, like.shape, device=like.device).to(like.dtype) * 2 - 1
