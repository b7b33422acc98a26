"""What every head family's outputs are brought to before they are compared: one row per prior, before NMS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_ptq.errors import PTQError

# corners in pixels are cut here: an exponential in the decoding of a broken box overflows
FARTHEST = 1e5
# of sizes that are exponentials: beyond it they are as far as boxes go, and their gradients would not be finite
LARGEST_EXPONENT = 20.0
# of probabilities that heads return in place of logits
LEAST_PROBABILITY = 1e-6
# masks that are compared, of an image: as many as mmdet's own configs let a detector find
MASKS = 100


@dataclass
class Regions:
    """Where the stages behind the region proposal network looked, or a decoder whose queries are chosen.

    Args:
        proposals: What the network proposed for each of the N images; None where they
            come from elsewhere.
        rois: (M, 5) RoIs (image index, then the box), one tensor for each time that RoIs were read
            out of the features: stage after stage of a cascade, then masks.
        queries: Positions that became queries, (N, Q), choice after choice.
    """

    proposals: list[InstanceData] | None = None
    rois: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)


@dataclass
class Masks:
    """Masks of priors, drawn where they are asked for: many heads could draw one for every prior.

    Args:
        draw: From the rows of M priors, (M, 2) of image and prior, image by image, to their (M, H, W) logits.
        rows: The priors that have a mask, (M, 2), image by image; others cannot be drawn. None: all of them.
            Defaults to None.
    """

    draw: Callable[[Tensor], Tensor]
    rows: Tensor | None = None

    def detach(self) -> Masks:
        """Returns the same masks, cut from the graph."""
        return Masks(lambda rows: self.draw(rows).detach(), self.rows)

    def most_confident(self, confidence: Tensor) -> Tensor:
        """Returns the rows of the priors to compare: of each image the :data:`MASKS` most confident that have a mask.

        Args:
            confidence: (N, P), see :meth:`AlignedPredictions.confidence`.
        """
        if self.rows is not None:
            return self.rows
        best = confidence.topk(min(MASKS, confidence.shape[1]), dim=1).indices
        image = torch.arange(len(best), device=best.device)[:, None].expand_as(best)
        return torch.stack([image, best], -1).flatten(0, 1)


@dataclass
class AlignedPredictions:
    """Per-prior outputs before NMS, in the same order for the float and the quantized detector.

    N images, P priors (all levels, level by level, in mmdet's own order), C classes without background.
    Either ``cls_logits`` or ``raw`` is set.

    Args:
        cls_logits: (N, P, C) for sigmoid heads; (N, P, C + 1) for softmax heads, background
            last.
        boxes: (N, P, 4) decoded ``x1, y1, x2, y2`` in pixels of the network input,
            differentiable and not clipped to the image (clipping stops gradients). None for heads without
            boxes.
        activation: ``'sigmoid'`` or ``'softmax'``. Defaults to ``'sigmoid'``.
        quality_logits: (N, P) objectness, centerness or predicted IoU. Defaults to None.
        distributions: (N, P, 4, reg_max + 1) logits over the sides' distances (GFL). Defaults
            to None.
        masks: Mask logits of the priors. Defaults to None.
        level_sizes: Priors per level; sums to P. Defaults to ``()``.
        raw: The flat raw outputs of a head that no adapter knows. Defaults to None.
        regions: What a two-stage detector's second stage was evaluated on. Defaults to None.
        proposal_stage: The region proposal network's own predictions. Defaults to
            None.
    """

    cls_logits: Tensor | None
    boxes: Tensor | None = None
    activation: str = 'sigmoid'
    quality_logits: Tensor | None = None
    distributions: Tensor | None = None
    masks: Masks | None = None
    level_sizes: tuple[int, ...] = ()
    raw: list[Tensor] | None = None
    regions: Regions | None = None
    proposal_stage: AlignedPredictions | None = None

    def confidence(self) -> Tensor:
        """Returns the score that filters boxes, (N, P): best class without background, times the quality."""
        if self.cls_logits is None:
            raise PTQError('raw outputs have no confidence: register an adapter for the head with align_head.register')
        if self.activation == 'softmax':
            best = self.cls_logits.softmax(-1)[..., :-1].amax(-1)
        else:
            best = self.cls_logits.amax(-1).sigmoid()
        return best if self.quality_logits is None else best * self.quality_logits.sigmoid()

    def detach(self) -> AlignedPredictions:
        """Returns the same values, cut from the graph."""
        changes = {name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.raw is not None:
            changes['raw'] = [value.detach() for value in self.raw]
        for name in ('masks', 'proposal_stage'):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name).detach()
        return replace(self, **changes)

    def with_finite_boxes(self) -> AlignedPredictions:
        """Returns the same predictions, boxes that are not finite or far outside cut to what can be compared."""
        changes = {}
        if self.boxes is not None:
            changes['boxes'] = self.boxes.nan_to_num(0).clamp(-FARTHEST, FARTHEST)
        if self.proposal_stage is not None:
            changes['proposal_stage'] = self.proposal_stage.with_finite_boxes()
        return replace(self, **changes)

    def take(self, index: Tensor) -> AlignedPredictions:
        """Returns the priors named by ``index``, image by image, without masks; ``level_sizes`` becomes the one size K.

        Args:
            index: (N, K) integer positions along the prior axis.
        """
        changes = dict(masks=None)
        for name in ('cls_logits', 'boxes', 'quality_logits', 'distributions'):
            value = getattr(self, name)
            if value is not None:
                images = torch.arange(len(index), device=index.device)[:, None]
                changes[name] = value[images, index]
        return replace(self, level_sizes=(index.shape[1],), **changes)
