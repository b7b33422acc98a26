"""From a head's raw outputs to :class:`AlignedPredictions`: single dispatch on the head's class."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.utils._pytree import tree_iter

from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions.aligned import AlignedPredictions

# A head decodes in these methods, in mmdet and in whatever inherits from it.
DECODING_METHODS = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_decode', '_bbox_post_process')


@functools.singledispatch
def align_head(head: Any, outputs: Any, batch_img_metas: list[dict]) -> AlignedPredictions:
    """Aligns what a head's (or an unusual detector's) forward returned; extend it for a head of your own.

    A head that nothing is registered for, or whose subclass decodes in its own way, falls back to raw
    outputs.

    Args:
        head: The head; its class selects the adapter.
        outputs: What ``head.forward`` returned in eval mode.
        batch_img_metas: Meta information of the N images.

    Returns:
        Differentiable with respect to ``outputs``.

    Example:
        >>> @align_head.register(MyHead)
        ... def align_my_head(head, outputs, batch_img_metas):
        ...     return AlignedPredictions(cls_logits=..., boxes=..., level_sizes=...)
    """
    return align_raw(head, outputs, 'no adapter is registered for it')


def align_raw(head: Any, outputs: Any, reason: str) -> AlignedPredictions:
    """Keeps all floating-point outputs as they are, and says once per class that it does so.

    Args:
        head: The head (or detector) named in the message.
        outputs: Tensors in nested lists, tuples and mappings.
        reason: Why no adapter could be used.
    """
    name = type(head).__name__
    announce(
        f'{name}: {reason}, so the global loss compares raw outputs instead of filtered boxes; '
        f'mmdet_ptq.predictions.align_head.register({name}) teaches it.'
    )
    tensors = [leaf for leaf in tree_iter(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return AlignedPredictions(cls_logits=None, raw=tensors)


@functools.cache
def announce(message: str) -> None:
    """Logs a warning, the first time it is given."""
    print_log(message, logger='current', level=logging.WARNING)


def own_decoding(cls: type, base: type) -> list[str]:
    """Returns the decoding methods that ``cls`` takes from elsewhere than ``base``."""
    younger = cls.__mro__[: cls.__mro__.index(base)]
    return [name for name in DECODING_METHODS if any(name in vars(klass) for klass in younger)]


def adapter(*classes: type) -> Callable:
    """Registers an adapter for head classes, and for those of their subclasses that decode as they do.

    The rule: a subclass that redefines any of ``DECODING_METHODS`` decodes in a way the adapter was not
    written for, and goes to the raw fallback until an adapter is registered for it.

    Args:
        classes: Head classes that the decorated function aligns.
    """

    def register(func: Callable) -> Callable:
        for cls in classes:
            align_head.register(cls, functools.partial(_checked, cls, func))
        return func

    return register


def _checked(cls: type, func: Callable, head: Any, outputs: Any, batch_img_metas: list[dict]) -> AlignedPredictions:
    redefined = own_decoding(type(head), cls)
    if redefined:
        return align_raw(head, outputs, f'it redefines {", ".join(redefined)} of {cls.__name__}')
    check_eval(head)
    return func(head, outputs, batch_img_metas)


def check_eval(head: Any) -> None:
    """Refuses a head in training mode.

    Raises:
        PTQError: It is.
    """
    if head.training:
        raise PTQError(
            f'{type(head).__name__} returns other outputs in training mode than it decodes: '
            'call detector.eval() before aligning predictions'
        )


def flatten_levels(maps: Sequence[Tensor], channels: int) -> Tensor:
    """Returns level maps (N, A * channels, H, W) as one (N, P, channels) tensor, at least in float32.

    The order is mmdet's: level by level, row by row, then the A priors of a location.
    """
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, channels) for m in maps], 1).to(dtype)


def level_sizes(maps: Sequence[Tensor], channels: int) -> tuple[int, ...]:
    """Returns how many priors each level's map (N, A * channels, H, W) holds."""
    return tuple(m.shape[1] // channels * m.shape[2] * m.shape[3] for m in maps)
