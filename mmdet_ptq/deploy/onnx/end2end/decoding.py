"""mmdet's decoding of dense heads in operations of constant shape, one class for each method of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import GFLHead, RPNHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import delta2bbox
from mmdet.structures.bbox import distance2bbox, get_box_tensor
from torch import Tensor, nn

from mmdet_ptq.deploy.onnx.end2end.suppression import Candidates


class Decoding:
    """How a head's raw outputs become candidates.

    Args:
        head: The head.
        grids: Height and width of each level's maps.
    """

    METHODS: dict[str, type]

    def __init__(self, head: nn.Module, grids: Sequence[Sequence[int]]) -> None:
        raise NotImplementedError

    @classmethod
    def decodes(cls, head: nn.Module) -> bool:
        """Whether every method that takes part in a head's decoding is the one that this class repeats."""
        return all(getattr(type(head), name, None) is getattr(owner, name) for name, owner in cls.METHODS.items())

    def __call__(self, outputs: Sequence[Any], border: Tensor) -> Candidates:
        """Candidates of every image.

        Args:
            outputs: The head's raw outputs.
            border: (N, 1, 4): width and height of each image within its tensor, twice.
        """
        raise NotImplementedError


class LevelDecoding(Decoding):
    """``BaseDenseHead``: SSD, RetinaNet, ATSS, FCOS, RTMDet, ...; the best of each level are decoded."""

    METHODS = dict(
        predict=BaseDenseHead,
        predict_by_feat=BaseDenseHead,
        _predict_by_feat_single=BaseDenseHead,
        _bbox_post_process=BaseDenseHead,
    )

    def __init__(self, head: nn.Module, grids: Sequence[Sequence[int]]) -> None:
        self.channels, self.sigmoid, self.coder = head.cls_out_channels, head.use_sigmoid_cls, head.bbox_coder
        device = next(head.parameters()).device
        self.priors = [get_box_tensor(level) for level in head.prior_generator.grid_priors(grids, device=device)]
        self.threshold, self.count = self._threshold(head.test_cfg), head.test_cfg.get('nms_pre', -1)
        self.smallest = head.test_cfg.get('min_bbox_size', -1)

    @classmethod
    def decodes(cls, head: nn.Module) -> bool:
        # a custom activation of the scores belongs to the loss
        return (
            super().decodes(head)
            and not getattr(head.loss_cls, 'custom_cls_channels', False)
            and type(head.bbox_coder) in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder)
        )

    def __call__(self, outputs: Sequence[Any], border: Tensor) -> Candidates:
        levels = [self._level(index, *maps) for index, maps in enumerate(zip(*outputs, strict=True))]
        scores, labels, priors, deltas = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        boxes = self._decode(priors, deltas)
        if self.coder.clip_border:
            boxes = torch.minimum(boxes.clamp(min=0), border)
        if self.smallest >= 0:
            width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
            scores = torch.where((width > self.smallest) & (height > self.smallest), scores, 0.0)
        return Candidates(boxes, scores, labels)

    def _level(self, index: int, classes: Tensor, deltas: Tensor, quality: Tensor | None = None) -> tuple[Tensor, ...]:
        """The best scores of one level (N, B) with their labels, priors (N, B, 2 or 4) and deltas (N, B, D)."""
        count = len(self.priors[index])
        ranks = _rows(classes, count)
        if not self.sigmoid:
            # the background is last; OpenVINO loses a slice in this place
            ranks = ranks.softmax(-1).split([self.channels - 1, 1], -1)[0]
        best, places, labels = _best(ranks, self.count)
        scores = best.sigmoid() if self.sigmoid else best
        kept = scores > self.threshold
        if quality is not None:
            scores = scores * _rows(quality, count)[..., 0].gather(1, places).sigmoid()
        deltas = self._distances(index, _take(_rows(deltas, count), places))
        return torch.where(kept, scores, 0.0), labels, self.priors[index][places], deltas

    def _threshold(self, test_cfg: dict) -> float:
        return test_cfg['score_thr']

    def _distances(self, index: int, deltas: Tensor) -> Tensor:
        return deltas

    def _decode(self, priors: Tensor, deltas: Tensor) -> Tensor:
        if isinstance(self.coder, DistancePointBBoxCoder):
            return distance2bbox(priors, deltas)
        boxes = delta2bbox(
            priors.flatten(0, 1),
            deltas.flatten(0, 1),
            self.coder.means,
            self.coder.stds,
            add_ctr_clamp=self.coder.add_ctr_clamp,
            ctr_clamp=self.coder.ctr_clamp,
        )
        return boxes.reshape(deltas.shape)


class ProposalDecoding(LevelDecoding):
    """``RPNHead``: no threshold; levels are suppressed apart, so labels are the levels."""

    METHODS = dict(LevelDecoding.METHODS, _predict_by_feat_single=RPNHead, _bbox_post_process=RPNHead)

    def _threshold(self, test_cfg: dict) -> float:
        return 0.0

    def _level(self, index: int, classes: Tensor, deltas: Tensor, quality: Tensor | None = None) -> tuple[Tensor, ...]:
        scores, labels, *others = super()._level(index, classes, deltas)
        return scores, torch.full_like(labels, index), *others


class GflDecoding(LevelDecoding):
    """``GFLHead``: a distribution per side, whose mean times the stride is the distance."""

    METHODS = dict(LevelDecoding.METHODS, _predict_by_feat_single=GFLHead, anchor_center=GFLHead)

    def __init__(self, head: nn.Module, grids: Sequence[Sequence[int]]) -> None:
        super().__init__(head, grids)
        self.priors = [head.anchor_center(level) for level in self.priors]
        self.bins = head.integral.project.detach().clone()
        self.strides = [stride[0] for stride in head.prior_generator.strides]

    def _distances(self, index: int, deltas: Tensor) -> Tensor:
        sides = deltas.reshape(*deltas.shape[:2], 4, len(self.bins)).softmax(-1)
        return (sides * self.bins).sum(-1) * self.strides[index]


class YoloxDecoding(Decoding):
    """``YOLOXHead``: one class for each prior, all levels together, boxes are not clipped."""

    METHODS = dict(
        predict=BaseDenseHead, predict_by_feat=YOLOXHead, _bbox_decode=YOLOXHead, _bbox_post_process=YOLOXHead
    )

    def __init__(self, head: nn.Module, grids: Sequence[Sequence[int]]) -> None:
        device = next(head.parameters()).device
        self.priors = head.prior_generator.grid_priors(grids, device=device, with_stride=True)
        self.decode, self.threshold = head._bbox_decode, head.test_cfg['score_thr']

    def __call__(self, outputs: Sequence[Any], border: Tensor) -> Candidates:
        classes, deltas, objectness = (
            torch.cat([_rows(level, len(priors)) for level, priors in zip(maps, self.priors, strict=True)], 1)
            for maps in outputs
        )
        best, labels = classes.max(-1)
        scores = best.sigmoid() * objectness[..., 0].sigmoid()
        boxes = self.decode(torch.cat(self.priors), deltas)
        return Candidates(boxes, torch.where(scores >= self.threshold, scores, 0.0), labels)


def decoding_of(head: nn.Module) -> type[Decoding] | None:
    """The class that decodes as a head does; None where the head decodes in a way of its own."""
    return next((known for known in (LevelDecoding, GflDecoding, YoloxDecoding) if known.decodes(head)), None)


def _rows(maps: Tensor, count: int) -> Tensor:
    """(N, A * C, H, W) as (N, priors, C)."""
    flat = maps.permute(0, 2, 3, 1)
    return flat.reshape(maps.shape[0], count, maps.shape[1] * maps.shape[2] * maps.shape[3] // count)


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """(N, P, C) at the places (N, B): (N, B, C)."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2]))


def _best(ranks: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of prior and class.

    Args:
        ranks: (N, P, C), larger is better.
        count: How many; all where it is not positive.

    Returns:
        Ranks, priors and classes, (N, B) each.
    """
    images, priors, classes = ranks.shape
    first = None
    if 0 < count < priors:
        # a prior outside the best `count` priors has no pair among the best `count` pairs; sorting all takes long
        first = ranks.amax(-1).topk(count).indices
        ranks = _take(ranks, first)
    ranks = ranks.flatten(1)
    if 0 < count < ranks.shape[1]:
        ranks, pairs = ranks.topk(count)
    else:
        pairs = torch.arange(ranks.shape[1], device=ranks.device).expand(images, -1)
    places, labels = torch.div(pairs, classes, rounding_mode='trunc'), pairs % classes
    return ranks, places if first is None else first.gather(1, places), labels
