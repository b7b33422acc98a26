"""A detector as runtimes see it: one image tensor in, the head's raw outputs out, flat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmdet.models.detectors import SingleStageDetector
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError


class RawOutputs(nn.Module):
    """Calls a detector's ``mode='tensor'`` forward and flattens what it returns.

    Args:
        detector: The detector, float or quantized, in eval mode.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Raw head outputs, group by group, level by level.

        Args:
            input: (N, C, H, W), normalized as mmdet's data preprocessor does.
        """
        return tuple(flatten_outputs(self.detector(input, None, mode='tensor')))


def flatten_outputs(outputs: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples and lists, in order."""
    if isinstance(outputs, Tensor):
        yield outputs
        return
    for item in outputs:
        yield from flatten_outputs(item)


@torch.no_grad()
def first_outputs(detector: nn.Module, input_shape: tuple[int, int, int, int]) -> Any:
    """Raw outputs on an empty image, as nested as the head returns them.

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
        return detector(torch.zeros(input_shape, device=next(detector.parameters()).device), None, mode='tensor')
    except RuntimeError as error:
        told = str(error).strip().splitlines()[0].rstrip('.')
        raise PTQError(
            f'the detector cannot take images of {size}: {told}; choose another --input-shape, multiples of '
            '32 suit most detectors.'
        ) from error


def output_shapes(outputs: Any) -> list[list[int]]:
    """Shapes of the raw outputs in their flat order, without the number of images."""
    return [list(output.shape[1:]) for output in flatten_outputs(outputs)]


def output_layout(outputs: Any) -> Any:
    """The nesting of raw outputs as plain lists of positions in the flat order, as JSON can hold it."""
    count = iter(range(10**6))

    def layout(value: Any) -> Any:
        return next(count) if isinstance(value, Tensor) else [layout(item) for item in value]

    return layout(outputs)


def nest_outputs(flat: Sequence[Tensor], layout: Any) -> Any:
    """Inverse of :func:`flatten_outputs` for a layout of :func:`output_layout`; tuples, as heads return them."""
    return flat[layout] if isinstance(layout, int) else tuple(nest_outputs(flat, item) for item in layout)


def check_exportable(detector: nn.Module) -> None:
    """Refuses detectors whose raw outputs do not come from the image alone.

    Raises:
        PTQError: The detector has a second stage or a forward of its own.
    """
    if not isinstance(detector, SingleStageDetector) or type(detector)._forward is not SingleStageDetector._forward:
        raise PTQError(
            f'{type(detector).__name__} cannot be exported: runtimes take detectors of one stage, whose '
            'head reads nothing but the features; remove `ptq.export`.'
        )
