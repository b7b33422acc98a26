"""A network of a detector as runtimes see it: the image in, the head's raw outputs out, flat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from torch import Tensor, nn

from mmdet_ptq.deploy.network.parts import FIRST, Part, has_regions, parts_of
from mmdet_ptq.deploy.network.queries import has_queries
from mmdet_ptq.errors import PTQError, first_line
from mmdet_ptq.predictions.prototypes import has_prototypes
from mmdet_ptq.predictions.stock import runs_as
from mmdet_ptq.wrapping.watching.tensors import tensors_in


class RawOutputs(nn.Module):
    """Calls one network of a detector and flattens what it returns.

    Args:
        detector: The detector, float or quantized, in eval mode.
        part: The network. Defaults to the one that reads the image: the detector's ``mode='tensor'`` forward, of two
            stages the first.
    """

    def __init__(self, detector: nn.Module, part: Part = FIRST) -> None:
        super().__init__()
        self.detector = detector
        self.part = part

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Raw outputs, group by group, level by level.

        Args:
            *inputs: The image, (N, C, H, W), normalized as mmdet's data preprocessor does; or what the part reads.
        """
        return tuple(tensors_in(self.part.run(self.detector, *inputs)))


@torch.no_grad()
def first_outputs(detector: nn.Module, input_shape: tuple[int, int, int, int]) -> Any:
    """Raw outputs on an empty image, as nested as the detector's code returns them.

    Args:
        detector: The detector, in eval mode.
        input_shape: (N, C, H, W).

    Raises:
        PTQError: The detector does not take images of this size.
    """
    *_, height, width = input_shape
    size = f'{height}x{width} (height x width)'
    if min(height, width) < 1:
        raise PTQError(f'--input-shape must be two positive numbers, got {size}.')
    try:
        return FIRST.run(detector, torch.zeros(input_shape, device=next(detector.parameters()).device))
    except RuntimeError as error:
        told = first_line(error).rstrip('.')
        fix = 'choose another --input-shape, multiples of 32 suit most detectors'
        if ' channels' in told:  # which --input-shape does not choose
            fix = 'give the config of the detector that it was made from'
        raise PTQError(f'the detector cannot take images of {size}: {told}; {fix}.') from error


def output_shapes(outputs: Any) -> list[list[int]]:
    """Shapes of the raw outputs in their flat order, without the number of images."""
    return [list(output.shape[1:]) for output in tensors_in(outputs)]


@torch.no_grad()
def region_shapes(detector: nn.Module, image: Tensor) -> list[list[int]]:
    """Shapes of what the heads behind the regions of an image return, without the number of regions.

    None where a detector has no regions.
    """
    parts = parts_of(detector, image)[1:]
    return [shape for part in parts for shape in output_shapes(part.run(detector, *part.inputs))]


def output_layout(outputs: Any) -> Any:
    """The nesting of raw outputs as plain lists and dicts of positions in the flat order, as JSON can hold it."""
    count = iter(range(10**6))

    def layout(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {key: layout(item) for key, item in value.items()}
        if not isinstance(value, Tensor | list | tuple):
            raise PTQError(
                f'the head returns {value!r:.60} among its raw outputs, and exported models return tensors; leave it '
                'out of what `forward` returns, or leave out the export.'
            )
        return next(count) if isinstance(value, Tensor) else [layout(item) for item in value]

    return layout(outputs)


def nest_outputs(flat: Sequence[Tensor], layout: Any) -> Any:
    """Nests tensors in their flat order as an :func:`output_layout` says; in tuples, as heads return them."""
    if layout is None:
        return None
    if isinstance(layout, Mapping):
        return {key: nest_outputs(flat, item) for key, item in layout.items()}
    return flat[layout] if isinstance(layout, int) else tuple(nest_outputs(flat, item) for item in layout)


def only_head(detector: nn.Module) -> nn.Module | None:
    """The one head of a detector with one stage: of boxes, or of masks; None of any other."""
    if runs_as(detector, SingleStageDetector):
        return detector.bbox_head
    masks_alone = runs_as(detector, SingleStageInstanceSegmentor) and not detector.with_bbox
    return detector.mask_head if masks_alone else None


def check_exportable(detector: nn.Module) -> None:
    """Refuses detectors whose networks do not read the image, or features of its regions, alone.

    Raises:
        PTQError: The detector has a forward of its own.
    """
    known = has_regions(detector) or has_queries(detector) or has_prototypes(detector)
    if not known and only_head(detector) is None:
        raise PTQError(
            f'{type(detector).__name__} cannot be exported: runtimes take detectors of one or two stages, whose '
            'heads read nothing but features, and those with queries; remove `ptq.export`.'
        )
