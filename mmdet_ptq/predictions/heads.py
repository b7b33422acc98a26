"""Adapters of mmdet's dense heads: each mirrors one decoding method, for all priors and with gradients."""

from __future__ import annotations

import torch
from mmdet.models.dense_heads import (
    ConditionalDETRHead,
    DABDETRHead,
    DeformableDETRHead,
    DETRHead,
    DINOHead,
    FoveaHead,
    GFLHead,
    PAAHead,
    RepPointsHead,
    RPNHead,
    TOODHead,
    YOLOV3Head,
    YOLOXHead,
)
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, get_box_tensor
from torch import Tensor

from mmdet_ptq.predictions.aligned import LARGEST_EXPONENT, AlignedPredictions, Masks
from mmdet_ptq.predictions.dispatch import adapter, align_raw, flatten_levels, level_sizes


def _bounded(exponents: Tensor) -> Tensor:
    return exponents.clamp(max=LARGEST_EXPONENT)


@adapter(BaseDenseHead, RPNHead, PAAHead)
def align_dense(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """Heads that decode in ``BaseDenseHead``, with the head's own prior generator and box coder.

    Anchor heads (SSD, RetinaNet, ATSS, DDOD, FSAF, FreeAnchor, YOLOF, ...), point heads (FCOS, VFNet, RTMDet,
    AutoAssign, CenterNetUpdate, ...); what a forward multiplies by the stride (FCOS, RTMDet) is in its
    outputs already. RPNHead and PAAHead have methods of their own that decode alike; PAA's score is the
    square root of ours.
    """
    if getattr(getattr(head, 'loss_cls', None), 'custom_cls_channels', False):
        return align_raw(head, outputs, 'its scores come from the activation of a custom classification loss')
    return align_boxes(head, outputs)


def align_boxes(head, outputs: tuple, masks: Masks | None = None) -> AlignedPredictions:
    """Maps of scores, boxes and perhaps of a quality, as :func:`align_dense` says."""
    cls_maps, box_maps, *quality_maps = outputs
    channels = head.cls_out_channels
    cls_logits = flatten_levels(cls_maps, channels)
    deltas = flatten_levels(box_maps, head.bbox_coder.encode_size)
    return AlignedPredictions(
        cls_logits=cls_logits,
        boxes=_decode(head, priors_of(head, cls_maps), deltas),
        activation='sigmoid' if head.use_sigmoid_cls else 'softmax',
        quality_logits=flatten_levels(quality_maps[0], 1)[..., 0] if quality_maps else None,
        masks=masks,
        level_sizes=level_sizes(cls_maps, channels),
    )


@adapter(GFLHead)
def align_gfl(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """Generalized focal loss heads: a distribution per side, its mean times the stride is the distance."""
    cls_maps, box_maps = outputs
    channels, bins = head.cls_out_channels, head.reg_max + 1
    cls_logits = flatten_levels(cls_maps, channels)
    logits = flatten_levels(box_maps, 4 * bins)
    sizes = level_sizes(cls_maps, channels)
    distances = head.integral(logits).reshape(*logits.shape[:2], 4) * _strides(head, sizes, logits)
    centers = head.anchor_center(priors_of(head, cls_maps))
    return AlignedPredictions(
        cls_logits=cls_logits,
        boxes=_decode(head, centers, distances),
        distributions=logits.reshape(*logits.shape[:2], 4, bins),
        level_sizes=sizes,
    )


@adapter(YOLOXHead)
def align_yolox(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """YOLOX: centre and exponential size in units of the stride, and an objectness."""
    cls_maps, box_maps, objectness_maps = outputs
    channels = head.cls_out_channels
    deltas = flatten_levels(box_maps, 4)
    deltas = torch.cat([deltas[..., :2], _bounded(deltas[..., 2:])], -1)
    return AlignedPredictions(
        cls_logits=flatten_levels(cls_maps, channels),
        boxes=head._bbox_decode(priors_of(head, cls_maps, with_stride=True), deltas),
        quality_logits=flatten_levels(objectness_maps, 1)[..., 0],
        level_sizes=level_sizes(cls_maps, channels),
    )


@adapter(YOLOV3Head)
def align_yolov3(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """YOLOv3: boxes, objectness and classes in one map per level."""
    (maps,) = outputs
    values = flatten_levels(maps, head.num_attrib)
    sizes = level_sizes(maps, head.num_attrib)
    deltas = torch.cat([values[..., :2].sigmoid(), _bounded(values[..., 2:4])], -1)
    priors = torch.cat(head.prior_generator.grid_priors([m.shape[-2:] for m in maps], device=values.device))
    strides = torch.cat([values.new_full((size, 1), s) for size, s in zip(sizes, head.featmap_strides, strict=True)])
    return AlignedPredictions(
        cls_logits=values[..., 5:],
        boxes=get_box_tensor(head.bbox_coder.decode(priors, deltas, strides)),
        quality_logits=values[..., 4],
        level_sizes=sizes,
    )


@adapter(TOODHead)
def align_tood(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """TOOD: the forward returns probabilities, and boxes in units of the stride."""
    cls_maps, box_maps = outputs
    channels = head.cls_out_channels
    sizes = level_sizes(cls_maps, channels)
    boxes = flatten_levels(box_maps, 4)
    return AlignedPredictions(
        cls_logits=flatten_levels(cls_maps, channels).logit(eps=1e-6),
        boxes=boxes * _strides(head, sizes, boxes),
        level_sizes=sizes,
    )


@adapter(RepPointsHead)
def align_reppoints(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """RepPoints: boxes around the location, in units of the stride."""
    cls_maps, box_maps = outputs
    channels = head.cls_out_channels
    sizes = level_sizes(cls_maps, channels)
    offsets = flatten_levels(box_maps, 4)
    strides = torch.cat([offsets.new_full((size, 1), s) for size, s in zip(sizes, head.point_strides, strict=True)])
    return AlignedPredictions(
        cls_logits=flatten_levels(cls_maps, channels),
        boxes=offsets * strides + priors_of(head, cls_maps)[:, :2].repeat(1, 2),
        activation='sigmoid' if head.use_sigmoid_cls else 'softmax',
        level_sizes=sizes,
    )


@adapter(FoveaHead)
def align_fovea(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """FoveaBox: exponential distances in units of the level's base length."""
    cls_maps, box_maps = outputs
    channels = head.cls_out_channels
    sizes = level_sizes(cls_maps, channels)
    exponents = _bounded(flatten_levels(box_maps, 4))
    lengths = torch.cat([exponents.new_full((size, 1), s) for size, s in zip(sizes, head.base_edge_list, strict=True)])
    distances = exponents.exp() * lengths
    points = priors_of(head, cls_maps)[:, :2]
    return AlignedPredictions(
        cls_logits=flatten_levels(cls_maps, channels),
        boxes=torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1),
        level_sizes=sizes,
    )


def priors_of(head, maps, **kwargs) -> Tensor:
    """Returns the priors of all levels, (P, 2 or 4); one list for all images."""
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    sizes = [m.shape[-2:] for m in maps]
    levels = head.prior_generator.grid_priors(sizes, dtype=dtype, device=maps[0].device, **kwargs)
    return torch.cat([get_box_tensor(level) for level in levels])


def _strides(head, sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns each prior's stride, (P, 1)."""
    strides = head.prior_generator.strides
    return torch.cat([like.new_full((size, 1), s[0]) for size, s in zip(sizes, strides, strict=True)])


def _decode(head, priors: Tensor, deltas: Tensor) -> Tensor:
    """Returns (N, P, 4) boxes; images are folded into the prior axis because some coders take (P, 4) only."""
    num_images, num_priors, dim = deltas.shape
    boxes = head.bbox_coder.decode(priors.repeat(num_images, 1), deltas.reshape(-1, dim))
    return get_box_tensor(boxes).reshape(num_images, num_priors, 4)


@adapter(DETRHead, ConditionalDETRHead, DABDETRHead, DeformableDETRHead, DINOHead)
def align_detr(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """Queries of DETR and its kin: what the last decoder layer finds, boxes as shares of the image.

    A query is the same in both detectors: learned, or of the position that the float encoder chose
    (:mod:`mmdet_ptq.predictions.queries`).
    """
    cls_logits, shares = (layers[-1].to(torch.promote_types(layers.dtype, torch.float32)) for layers in outputs[:2])
    sizes = shares.new_tensor([[width, height] * 2 for height, width in (m['img_shape'][:2] for m in batch_img_metas)])
    return AlignedPredictions(
        cls_logits=cls_logits,
        boxes=bbox_cxcywh_to_xyxy(shares) * sizes[:, None],
        activation='sigmoid' if head.loss_cls.use_sigmoid else 'softmax',
        level_sizes=(cls_logits.shape[1],),
    )
