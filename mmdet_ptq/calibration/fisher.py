"""Which values matter to the detections: the diagonal Fisher information of the detector's global loss.

The global loss has no gradient at the float detector itself, which is its own target. The Fisher information does: it
is the expected squared gradient of the log-likelihood over labels drawn from the detector's own predictions.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import AlignedPredictions, predict_aligned
from mmdet_ptq.progress import track
from mmdet_ptq.quantizers import Observer
from mmdet_ptq.wrapping import quantization_mode
from mmdet_ptq.wrapping.state import STATE
from mmdet_ptq.wrapping.watching.channel_costs import Recorded, Take, not_weighed

# as in the global loss: theta_C, and how many priors an image counts
SCORE_THR, MAX_BOXES = 2e-4, 1000
# deviation of a box, in parts of its size, at which the L1 term is matched by a squared one: an IoU of about 0.9
BOX_DEVIATION = 0.05
# images on which activations are weighed
WEIGHED_IMAGES = 32


def weigh_activations(detector: nn.Module, observers: Mapping[str, Observer], batches: Iterable[Any]) -> None:
    """Tells observers how much the values of their activations matter: as their squared gradients.

    Args:
        detector: The prepared detector, in eval mode.
        observers: Activation name to observer; those that do not weigh values are left alone.
        batches: See :func:`weigh_tensors`.
    """
    wanted = {name: observer for name, observer in observers.items() if observer.weighs}
    if not wanted:
        return
    state = getattr(detector, STATE)

    def take(name: str, x: Tensor, weight: Tensor | None) -> None:
        if weight is not None:
            wanted[name].weigh(x, weight)

    try:
        state.recorded, state.only = [], frozenset(wanted)
        with quantization_mode(detector, 'observe'):
            weigh_tensors(detector, batches, state.recorded, take)
    finally:
        state.recorded = state.only = None


def weigh_tensors(detector: nn.Module, batches: Iterable[Any], recorded: Recorded, take: Take) -> None:
    """Measures how much the values of tensors matter to the detections, one image after another.

    The random signs are the same in every run and on every rank. Where no image gives gradients, the tensors come
    without, and the log says so.

    Args:
        detector: The float detector, in eval mode.
        batches: Calibration batches as a dataloader yields them; their first :data:`WEIGHED_IMAGES` images are used.
        recorded: To which the detector, as it runs, appends tensors with their keys.
        take: Is given each key, the tensor, and the squared gradients of its values, or None.
    """
    failures, images = [], 0
    with torch.random.fork_rng(), torch.enable_grad(), _constant(detector):
        torch.manual_seed(0)
        for inputs, samples in _single_images(detector, batches):
            images += 1
            try:
                found = _gradients(detector, inputs.requires_grad_(), samples, recorded)
            except Exception as error:  # whatever an unknown head may raise
                failures.append(f'{type(error).__name__}: {error}')
                continue
            while found:
                key, x, gradient = found.pop()
                take(key, x, torch.zeros_like(x) if gradient is None else gradient.square())
    if failures:
        print_log(
            f'which values matter to the detections cannot be told on {len(failures)} of {images} images '
            f'({failures[0]})' + (', all of them count alike' if len(failures) == images else ''),
            'current',
            logging.WARNING,
        )
    if len(failures) == images:
        for inputs, samples in _single_images(detector, batches):
            run = functools.partial(detector, inputs, copy.deepcopy(samples), mode='predict')
            not_weighed(run)(recorded, take)


def _single_images(detector: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Tensor, list]]:
    """The first images, one by one: gradients of a batch take as much memory as it has images."""
    left = WEIGHED_IMAGES
    for batch in track(batches, description='weighing activations'):
        data = detector.data_preprocessor(batch, False)
        for index, sample in enumerate(data['data_samples'][:left]):
            yield data['inputs'][index : index + 1], [sample]
        left -= len(data['data_samples'])
        if left <= 0:
            return


def _gradients(
    detector: nn.Module, image: Tensor, samples: list, recorded: Recorded
) -> list[tuple[Any, Tensor, Tensor | None]]:
    """Key of what is recorded on an image, the tensor, and its gradient; the last that was recorded first.

    They are as large as all activations: what was recorded is forgotten, so that nothing outlives its use.
    """
    recorded.clear()
    try:
        # one draw: an image more tells more than a draw more
        loss = noisy_loss(predict_aligned(detector, image, samples))
        tensors = [(key, x) for key, x in recorded if x.requires_grad]
    finally:
        recorded.clear()
    gradients = torch.autograd.grad(loss, [x for _, x in tensors], allow_unused=True)
    # a sum is finite if all of it is, and takes one pass
    if not all(g is None or math.isfinite(g.sum()) for g in gradients):
        raise PTQError('gradients are not finite')
    return [(key, x.detach(), g) for (key, x), g in reversed(list(zip(tensors, gradients, strict=True)))]


@contextmanager
def _constant(detector: nn.Module) -> Iterator[None]:
    """Its parameters need no gradients meanwhile: layers would keep what they read for them."""
    learnt = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)


def noisy_loss(predictions: AlignedPredictions) -> Tensor:
    """A sum whose squared gradient is, on average, the diagonal Fisher information of the predictions.

    Each output is multiplied by noise with the covariance that the gradient of the log-likelihood has over labels drawn
    from the predictions: p (1 - p) for sigmoid scores, the quality and masks, diag(p) - p p^T for softmax scores. Its
    size is fixed and its sign random: of labels themselves, one of probability 0.001 would be drawn once in a thousand
    times. Boxes, whose L1 term has no curvature of its own, get that of the squared term that touches it from above at
    a deviation d of BOX_DEVIATION: |x| <= x^2 / (2 d) + d / 2, a Fisher information of 1 / d for each coordinate. Masks
    count where a head finds no boxes.

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
    # where there are boxes, too, masks did not help: see docs/experiments.md
    if predictions.masks is not None and predictions.boxes is None:
        rows = predictions.masks.most_confident(confidence)
        rows = rows[confidence[rows[:, 0], rows[:, 1]] >= SCORE_THR]
        if len(rows):
            masks = predictions.masks.draw(rows)
            # the term is the mean of the pixels
            loss = loss + (masks * _score_noise(masks.detach(), 'sigmoid')).sum() / math.sqrt(masks[0].numel())
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
