"""Adapters of heads that find masks without a second stage: what is drawn of a prior is compared pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import (
    DecoupledSOLOHead,
    Mask2FormerHead,
    MaskFormerHead,
    RTMDetInsHead,
    SOLOHead,
    SOLOV2Head,
)
from torch import Tensor

from mmdet_ptq.predictions.aligned import LEAST_PROBABILITY, AlignedPredictions, Masks
from mmdet_ptq.predictions.dispatch import adapter, flatten_levels, level_sizes
from mmdet_ptq.predictions.heads import align_boxes, priors_of


@adapter(RTMDetInsHead)
def align_rtmdet_ins(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """RTMDet-Ins: boxes as RTMDet's, masks by a small network of each prior's own."""
    cls_maps, box_maps, kernel_maps, features = outputs
    kernels = flatten_levels(kernel_maps, head.num_gen_params)
    priors = priors_of(head, cls_maps, with_stride=True)

    def draw(image: int, chosen: Tensor) -> Tensor:
        return head._mask_predict_by_feat_single(
            features[image].to(kernels.dtype), kernels[image, chosen], priors[chosen]
        )

    return align_boxes(head, (cls_maps, box_maps), masks=by_image(draw))


@adapter(SOLOHead)
def align_solo(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """SOLO: a mask for each cell of the grids; the forward returns probabilities."""
    mask_maps, cls_maps = outputs
    masks = _probabilities(mask_maps)
    return _cells(cls_maps, by_image(lambda image, chosen: _logit(masks[image, chosen])))


@adapter(DecoupledSOLOHead)
def align_decoupled_solo(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """Decoupled SOLO: the mask of a cell is that of its column times that of its row."""
    *sides, cls_maps = outputs
    columns, rows = (_probabilities(maps) for maps in sides)
    # the column and the row of each cell, counted through all grids
    first, places = 0, []
    for cls_map in cls_maps:
        grid = cls_map.shape[-1]
        y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing='ij')
        places.append(torch.stack([x.flatten(), y.flatten()], 1) + first)
        first += grid
    of_cell = torch.cat(places).to(columns.device)

    def draw(image: int, chosen: Tensor) -> Tensor:
        column, row = of_cell[chosen].unbind(1)
        return _logit(columns[image, column] * rows[image, row])

    return _cells(cls_maps, by_image(draw))


@adapter(SOLOV2Head)
def align_solov2(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """SOLOv2: each cell convolves the image's features with a kernel of its own."""
    kernel_maps, cls_maps, features = outputs
    kernels = flatten_levels(kernel_maps, head.kernel_out_channels)
    size = head.dynamic_conv_size

    def draw(image: int, chosen: Tensor) -> Tensor:
        own = kernels[image, chosen].reshape(len(chosen), -1, size, size)
        return F.conv2d(features[image : image + 1].to(own.dtype), own)[0]

    channels = head.cls_out_channels
    return AlignedPredictions(
        cls_logits=flatten_levels(cls_maps, channels), masks=by_image(draw), level_sizes=level_sizes(cls_maps, channels)
    )


@adapter(MaskFormerHead, Mask2FormerHead)
def align_mask_queries(head, outputs: tuple, batch_img_metas: list[dict]) -> AlignedPredictions:
    """MaskFormer and Mask2Former: what the last decoder layer says of each query."""
    cls_logits, masks = (layers[-1].to(torch.promote_types(layers[-1].dtype, torch.float32)) for layers in outputs)
    return AlignedPredictions(
        cls_logits=cls_logits,
        activation='softmax',
        masks=Masks(lambda rows: masks[rows[:, 0], rows[:, 1]]),
        level_sizes=(cls_logits.shape[1],),
    )


def _cells(cls_maps: list[Tensor], masks: Masks) -> AlignedPredictions:
    """Cells of grids; their probabilities are zero where a neighbour's is higher."""
    channels = cls_maps[0].shape[1]
    return AlignedPredictions(
        cls_logits=_logit(flatten_levels(cls_maps, channels)), masks=masks, level_sizes=level_sizes(cls_maps, channels)
    )


def _probabilities(maps: list[Tensor]) -> Tensor:
    """Masks of all levels, (N, P, H, W): SOLO brings them to one size."""
    return torch.cat(list(maps), 1).to(torch.promote_types(maps[0].dtype, torch.float32))


def _logit(probabilities: Tensor) -> Tensor:
    return probabilities.logit(eps=LEAST_PROBABILITY)


def by_image(draw: Callable[[int, Tensor], Tensor]) -> Masks:
    """Masks of heads that draw those of one image at once."""

    def draw_all(rows: Tensor) -> Tensor:
        return torch.cat([draw(image, rows[rows[:, 0] == image, 1]) for image in rows[:, 0].unique().tolist()])

    return Masks(draw_all)
