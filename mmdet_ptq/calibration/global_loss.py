"""The filtered global loss: the whole detector against the float one, on the boxes that matter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import AlignedPredictions

# sides below one pixel are normalised as one pixel
MIN_SIDE = 1.0
# a prior whose float box overlaps an annotated box this much stands for it (target='ground_truth')
MATCH_IOU = 0.5


class FilteredGlobalLoss(nn.Module):
    """Filtered global loss of Reg-PTQ (Ding et al., CVPR 2024), L_G.

    Per box i, y and b of the float detector, hats of the quantized one, before NMS and paired by prior:

    ``L_G = (1/n) sum_i m_i [cls_weight * CE(y_i, y_hat_i) + box_weight * L_1(b_i, b_hat_i)]``,
    ``m_i = [score_i >= score_thr] * [IoU(b_i, b_hat_i) >= iou_thr]``, n the kept boxes of the batch.

    Every term is zero when both detectors agree: the target's own entropy is subtracted from the cross
    entropies. The published formula leaves open p of its L_p, and how the terms are normalised and weighted: boxes are
    measured in units of the target's width and height, and n counts kept boxes, because 1 / (all priors) would vanish.
    The mask carries no gradient. An image of which no box is kept adds zero, and is counted.

    Args:
        cfg: What is filtered, compared and weighted. Defaults to None, the ``global_loss`` section as it is.
        shared: Whether every rank has a part of the batch: kept boxes are counted over all ranks, so that the mean of
            the ranks' losses is that of the whole batch. Defaults to False.
    """

    def __init__(self, cfg: GlobalLossConfig | None = None, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.cfg = GlobalLossConfig() if cfg is None else cfg

    def unfiltered(self) -> FilteredGlobalLoss:
        """The same loss without the IoU filter, to compare states of one detector by.

        The filter looks at the quantized detector's boxes: a state that ruins a box would be rid of its loss.
        """
        return FilteredGlobalLoss(replace(self.cfg, iou_thr=0.0, combine='and'))

    def forward(
        self, student: AlignedPredictions, teacher: AlignedPredictions, batch_gt: list | None = None
    ) -> dict[str, Tensor]:
        """Compares the quantized detector's predictions with the float detector's on the same N images.

        Args:
            student: Of the quantized detector, with gradients.
            teacher: Of the float detector.
            batch_gt: N items with ``bboxes`` (G, 4) in pixels of the network
                input and ``labels`` (G,); needed by ``target='ground_truth'``. Defaults to None.

        Returns:
            Weighted terms ``loss_cls``, ``loss_box``, ``loss_quality``,
            ``loss_distribution``, ``loss_mask`` as far as the head has them (``loss_raw`` alone for raw outputs),
            and for the log ``kept`` (boxes per image), ``kept_share`` (of all priors) and ``images_without_boxes``.
            The region proposal network of a two-stage detector adds the same with ``rpn_`` in the name.

        Raises:
            PTQError: If annotations are needed and missing, or the two predictions do not pair.
        """
        student, teacher = student.with_finite_boxes(), teacher.detach().with_finite_boxes()
        if self.cfg.target == 'ground_truth' and batch_gt is None:
            raise PTQError(
                "global_loss.target='ground_truth' needs annotated calibration images: "
                "use target='float' for images without annotations"
            )
        losses = self._stage(student, teacher, batch_gt)
        if teacher.proposal_stage is not None:
            first = self._stage(student.proposal_stage, teacher.proposal_stage, batch_gt)
            for name, value in first.items():
                losses[name.replace('loss_', 'loss_rpn_') if 'loss_' in name else f'rpn_{name}'] = value
        return losses

    def _stage(self, student: AlignedPredictions, teacher: AlignedPredictions, batch_gt) -> dict[str, Tensor]:
        if teacher.raw is not None:
            return {'loss_raw': self.cfg.cls_weight * _raw_loss(student.raw, teacher.raw)}
        if student.cls_logits.shape != teacher.cls_logits.shape:
            raise PTQError(
                f'the quantized detector predicts {tuple(student.cls_logits.shape)} class scores and the '
                f'float one {tuple(teacher.cls_logits.shape)}: both must see the same images and proposals'
            )
        num_images, num_priors = teacher.cls_logits.shape[:2]
        masks = {} if teacher.masks is None else self._mask_term(student, teacher)
        if self.cfg.max_boxes is not None and self.cfg.max_boxes < num_priors:
            best = teacher.confidence().topk(self.cfg.max_boxes, dim=1).indices
            student, teacher = student.take(best), teacher.take(best)
        target = (
            self._float_target(student, teacher)
            if self.cfg.target == 'float'
            else self._ground_truth_target(teacher, batch_gt)
        )
        kept_per_image = target.keep.sum(1)
        losses = self._terms(student, teacher, target)
        losses.update(
            masks,
            kept=kept_per_image.float().mean(),
            kept_share=kept_per_image.sum() / max(num_images * num_priors, 1),
            images_without_boxes=(kept_per_image == 0).sum().float(),
        )
        return losses

    def _terms(self, student: AlignedPredictions, teacher: AlignedPredictions, target: _Target) -> dict[str, Tensor]:
        keep, keep_box = target.keep, target.keep_box
        count, count_box = self._count(keep), self._count(keep_box)
        # sums over an empty selection are zero and differentiable: an empty mask needs no case of its own
        if target.labels is None:
            cls_term = _divergence(student.cls_logits[keep], teacher.cls_logits[keep], teacher.activation)
        else:
            cls_term = _cross_entropy(student.cls_logits[keep], target.labels[keep], teacher.activation)
        losses = {'loss_cls': self.cfg.cls_weight * cls_term.sum() / count}
        if teacher.boxes is not None:
            box_term = self._box_term(student.boxes[keep_box], target.boxes[keep_box])
            losses['loss_box'] = self.cfg.box_weight * box_term.sum() / count_box
        if teacher.quality_logits is not None:
            quality_term = _divergence(
                student.quality_logits[keep][:, None], teacher.quality_logits[keep][:, None], 'sigmoid'
            )
            losses['loss_quality'] = self.cfg.quality_weight * quality_term.sum() / count
        if teacher.distributions is not None:
            sides = _divergence(student.distributions[keep_box], teacher.distributions[keep_box], 'softmax')
            losses['loss_distribution'] = self.cfg.distribution_weight * sides.mean(-1).sum() / count_box
        return losses

    def _mask_term(self, student: AlignedPredictions, teacher: AlignedPredictions) -> dict[str, Tensor]:
        """Masks of the priors that the filters keep against the float detector's, whatever else is the target."""
        rows = teacher.masks.most_confident(teacher.confidence())
        keep = self._float_target(student, teacher).keep[rows[:, 0], rows[:, 1]]
        rows = rows[keep]
        if not len(rows):
            return {'loss_mask': 0 * student.cls_logits.sum()}
        term = _divergence(student.masks.draw(rows)[..., None], teacher.masks.draw(rows)[..., None], 'sigmoid')
        return {'loss_mask': self.cfg.mask_weight * term.mean((1, 2)).sum() / self._count(keep)}

    def _count(self, keep: Tensor) -> Tensor:
        """How many boxes are kept; where ranks share a batch, how many on average."""
        if not self.shared:
            return keep.sum().clamp(min=1)
        count = keep.sum().float()
        all_reduce(count, 'sum')
        return count.clamp(min=1) / get_world_size()

    @torch.no_grad()
    def _float_target(self, student: AlignedPredictions, teacher: AlignedPredictions) -> _Target:
        keep = teacher.confidence() >= self.cfg.score_thr
        if teacher.boxes is not None:
            overlaps = box_iou(teacher.boxes, student.boxes) >= self.cfg.iou_thr
            keep = keep & overlaps if self.cfg.combine == 'and' else keep | overlaps
        return _Target(keep, keep, teacher.boxes)

    @torch.no_grad()
    def _ground_truth_target(self, teacher: AlignedPredictions, batch_gt) -> _Target:
        if teacher.boxes is None:
            raise PTQError("global_loss.target='ground_truth' needs a head that predicts boxes: use target='float'")
        labels = torch.zeros_like(teacher.cls_logits)
        if teacher.activation == 'softmax':
            labels[..., -1] = 1
        boxes = teacher.boxes.clone()
        positive = torch.zeros_like(teacher.cls_logits[..., 0], dtype=torch.bool)
        num_classes = labels.shape[-1] - (teacher.activation == 'softmax')
        for i, instances in enumerate(batch_gt):
            annotated = getattr(instances.bboxes, 'tensor', instances.bboxes).to(boxes)
            if len(annotated) == 0:
                continue
            overlap, match = box_iou(teacher.boxes[i][:, None], annotated).max(1)
            positive[i] = overlap >= MATCH_IOU
            rows = positive[i].nonzero()[:, 0]
            boxes[i, rows] = annotated[match[rows]]
            labels[i, rows] = 0
            # a region proposal network knows one class, whatever the object
            classes = instances.labels.to(match.device)[match[rows]] if num_classes > 1 else torch.zeros_like(rows)
            labels[i, rows, classes] = 1
        keep = positive | (teacher.confidence() >= self.cfg.score_thr)
        return _Target(keep, positive, boxes, labels)

    def _box_term(self, boxes: Tensor, target: Tensor) -> Tensor:
        """Returns one value per pair of boxes (K, 4), zero where they are equal."""
        if self.cfg.box_loss == 'giou':
            # GIoU is undefined where the target has no area
            return torch.where(_area(target) > 0, 1 - generalized_box_iou(boxes, target), 0.0)
        size = (target[:, 2:] - target[:, :2]).clamp(min=MIN_SIDE).repeat(1, 2)
        return ((boxes - target) / size).abs().mean(1)


@dataclass
class _Target:
    keep: Tensor  # (N, P) bool: classification and quality
    keep_box: Tensor  # (N, P) bool: boxes and distributions
    boxes: Tensor | None  # (N, P, 4)
    labels: Tensor | None = None  # (N, P, C or C + 1) one-hot; None: the float detector's probabilities


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Returns the IoU of boxes (..., 4) that broadcast against each other; zero where neither has an area."""
    overlap, union, _ = _overlap(a, b)
    return overlap / union.clamp(min=1e-9)


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Returns the GIoU (Rezatofighi et al., CVPR 2019) of boxes (..., 4) that broadcast."""
    overlap, union, hull = _overlap(a, b)
    return overlap / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    corner = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    outer = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    overlap = (corner[1] - corner[0]).clamp(min=0).prod(-1)
    return overlap, _area(a) + _area(b) - overlap, (outer[1] - outer[0]).clamp(min=0).prod(-1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _cross_entropy(logits: Tensor, probabilities: Tensor, activation: str) -> Tensor:
    """Returns the cross entropy with soft targets, summed over the last axis."""
    if activation == 'sigmoid':
        return F.binary_cross_entropy_with_logits(logits, probabilities, reduction='none').sum(-1)
    return -(probabilities * logits.log_softmax(-1)).sum(-1)


def _divergence(logits: Tensor, target_logits: Tensor, activation: str) -> Tensor:
    """Returns the cross entropy less the target's entropy: exactly zero for equal logits."""
    probabilities = target_logits.sigmoid() if activation == 'sigmoid' else target_logits.softmax(-1)
    return _cross_entropy(logits, probabilities, activation) - _cross_entropy(target_logits, probabilities, activation)


def _raw_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Returns the mean over tensors of the squared error in units of the float tensor's variance."""
    if [s.shape for s in student] != [t.shape for t in teacher]:
        raise PTQError(
            'the raw outputs of the quantized and the float detector differ in shape, so they do not pair: '
            'register an adapter for the head with mmdet_ptq.predictions.align_head.register'
        )
    pairs = zip(student, teacher, strict=True)
    terms = [((s - t) ** 2).mean() / t.var(correction=0).clamp(min=1e-6) for s, t in pairs if t.numel()]
    if not terms:
        raise PTQError(
            'the head returned no floating-point tensor, so the global loss has nothing to compare: '
            'register an adapter for it with mmdet_ptq.predictions.align_head.register'
        )
    return torch.stack(terms).mean()
