"""One size for images of several: a canvas that holds them all, padded as mmdet's data preprocessor pads."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from mmdet.structures import DetDataSample
from torch import nn
from torch.nn import functional

from mmdet_ptq.deploy.network.queries import finds_boxes, finds_masks
from mmdet_ptq.errors import PTQError

# of strides: most networks take multiples of it
_COMMON = 32


def canvas_of(detector: nn.Module, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The smallest canvas that holds images of all sizes, a multiple of what the detector's maps need.

    Args:
        detector: The detector, with its data preprocessor.
        sizes: Heights and widths as the test pipeline gives them.
    """
    divisor = size_divisor(detector)
    return tuple(-(-max(sides) // divisor) * divisor for sides in zip(*sizes, strict=True))


def size_divisor(detector: nn.Module) -> int:
    """What heights and widths are multiples of when mmdet's data preprocessor has padded an image."""
    return getattr(detector.data_preprocessor, 'pad_size_divisor', 1)


def open_divisor(detector: nn.Module, sizes: Iterable[tuple[int, int]]) -> int:
    """What heights and widths are multiples of where they stay open.

    The preprocessor's divisor. Where it has none, because the pipeline pads: up to 32, what divides all sizes.

    Args:
        detector: The detector, with its data preprocessor.
        sizes: Heights and widths as the detector is given them.
    """
    divisor = size_divisor(detector)
    return divisor if divisor > 1 else math.gcd(_COMMON, *(side for size in sizes for side in size))


def check_canvas(canvas: tuple[int, int], sizes: Iterable[tuple[int, int]]) -> None:
    """Refuses a canvas that does not hold an image.

    Args:
        canvas: ``ptq.export_size``.
        sizes: Heights and widths as the test pipeline gives them.

    Raises:
        PTQError: Names the image's size.
    """
    for height, width in sizes:
        if height > canvas[0] or width > canvas[1]:
            raise PTQError(
                f'`ptq.export_size` is {canvas[0]}x{canvas[1]} (height x width), and the test pipeline gives an '
                f'image of {height}x{width}; make it larger, or leave it out: it is chosen then.'
            )


def with_size(inputs: tuple[np.ndarray, ...], count: int) -> tuple[np.ndarray, ...]:
    """What a model takes: an end-to-end model asks for the size of the image within its tensor, too.

    Args:
        inputs: What it is given; an image alone fills its tensor.
        count: How many inputs it has.
    """
    if len(inputs) != 1 or count != 2:
        return inputs
    return (*inputs, np.tile(np.float32(inputs[0].shape[2:]), (len(inputs[0]), 1)))


def pad_to(detector: nn.Module, canvas: tuple[int, int]) -> None:
    """Lets a detector's data preprocessor pad every image to a canvas from now on, in place.

    At the right and below, behind the normalization, with the preprocessor's value: what mmdet does with an image that
    is in one batch with larger ones. Larger images stay as they are. For a detector with queries the canvas is the
    image, whose network does not know what was padded; where it finds masks, they are cut as mmdet cuts them.

    Args:
        detector: The detector, with mmdet's data preprocessor.
        canvas: Height and width.
    """
    _unhook(detector.data_preprocessor._forward_hooks, _Canvas)
    detector.data_preprocessor.register_forward_hook(_Canvas(canvas, finds_boxes(detector)))
    if finds_masks(detector):
        _unhook(detector.panoptic_head._forward_pre_hooks, _WholeImages)
        detector.panoptic_head.register_forward_pre_hook(_WholeImages())


def _unhook(hooks: dict, kind: type) -> None:
    for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
        del hooks[key]


class _WholeImages:
    """Forward pre-hook of a head that would read what was padded."""

    def __call__(self, head: nn.Module, args: tuple) -> tuple:
        features, samples = args
        size = samples[0].batch_input_shape
        return features, [DetDataSample(metainfo={**sample.metainfo, 'img_shape': size}) for sample in samples]


class _Canvas:
    """Forward hook of a data preprocessor."""

    def __init__(self, canvas: tuple[int, int], is_image: bool) -> None:
        self.canvas = canvas
        self.is_image = is_image

    def __call__(self, preprocessor: nn.Module, args: tuple, data: dict) -> dict:
        images = data['inputs']
        bottom, right = (max(0, side - have) for side, have in zip(self.canvas, images.shape[-2:], strict=True))
        if not bottom and not right and not self.is_image:
            return data
        images = functional.pad(images, (0, right, 0, bottom), value=getattr(preprocessor, 'pad_value', 0))
        size = tuple(images.shape[-2:])
        for sample in data.get('data_samples') or ():
            sample.set_metainfo(dict(batch_input_shape=size, **(dict(img_shape=size) if self.is_image else {})))
        return {**data, 'inputs': images}
