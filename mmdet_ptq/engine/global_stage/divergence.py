"""Whether the global stage helped the images it trained on, where none are held out to choose a state by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from mmengine.logging import print_log

from mmdet_ptq.errors import PTQError

# images that the loss is measured on, before and after
IMAGES = 32
# a loss above FACTOR times that of before and MARGIN has exploded: noise of a batch is far less
FACTOR, MARGIN = 2.0, 1.0


def mean_loss(batch_loss: Callable[[Any], float], batches: Iterable[Any]) -> float:
    """The mean over batches of a loss.

    Args:
        batch_loss: Loss of a batch.
        batches: Batches, at least one.
    """
    losses = [batch_loss(batch) for batch in batches]
    return sum(losses) / len(losses)


def check_divergence(before: float, after: float) -> None:
    """Refuses a state whose loss exploded, and warns of one that is worse than the state before training.

    Args:
        before: Loss before training.
        after: Loss on the same images afterwards.

    Raises:
        PTQError: The loss is not finite, or far above that of before.
    """
    told = f'the global loss was {before:.4g} before the global stage and is {after:.4g} after it'
    if not after <= FACTOR * before + MARGIN:
        raise PTQError(
            f'{told}: training diverged; lower `ptq.global_loss.lr`, or hold images out (`ptq.global_loss.holdout`), '
            'so that the best state is kept.'
        )
    if after > before:
        print_log(
            f'{told}, on the images it trained on; lower rates may help, and `ptq.global_loss.holdout` keeps the best '
            'state',
            'current',
            level=logging.WARNING,
        )
