"""Detectors with queries, DETR and MaskFormer and their kin, as one network: what the last decoder layer finds.

Their transformers take a mask of what was padded. The network reads an image alone, so that all of it counts as the
image: :func:`mmdet_ptq.deploy.network.canvas.pad_to` tells mmdet the same, in float and in the simulation, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from mmdet.models.detectors import MaskFormer
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmdet_ptq.predictions.samples import with_annotations
from mmdet_ptq.predictions.stock import runs_as


def has_queries(detector: nn.Module) -> bool:
    """Returns whether a detector runs as mmdet's detectors with queries do, from the image alone."""
    return finds_boxes(detector) or finds_masks(detector)


def finds_boxes(detector: nn.Module) -> bool:
    """Returns whether its queries find boxes, as ``DetectionTransformer``'s."""
    return runs_as(detector, DetectionTransformer)


def finds_masks(detector: nn.Module) -> bool:
    """Returns whether its queries find masks, as ``MaskFormer``'s."""
    return runs_as(detector, MaskFormer)


def whole_image(image: Tensor) -> list[DetDataSample]:
    """Meta information of an image without padding."""
    size = tuple(image.shape[2:])
    meta = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)
    return with_annotations([DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)))])


def whole_images(detector: nn.Module, image: Tensor) -> list[DetDataSample]:
    """The same for a batch: one speaks for all where boxes are found, where masks are each has its own."""
    return whole_image(image) * (1 if finds_boxes(detector) else len(image))


def last_layer(outputs: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What is decoded of a head's outputs, (layers, N, queries, ...): those of the last layer, (N, queries, ...)."""
    return tuple(None if output is None else output[-1] for output in outputs)


def as_layers(outputs: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Inverse of :func:`last_layer`, with one layer."""
    return tuple(None if output is None else output[None] for output in outputs)


def unread_inputs(head: nn.Module) -> dict[str, Tensor]:
    """Arguments of a head's ``predict`` besides the samples, where its forward does not read them."""
    names = [
        name
        for name, parameter in inspect.signature(head.predict).parameters.items()
        if parameter.default is parameter.empty and name != 'batch_data_samples'
    ]
    return {name: torch.zeros(1, 1, 1, 1) for name in names}
