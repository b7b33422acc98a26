"""Exact integers for the first images of an evaluation: on thousands they would take as long as all else together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mmengine.dist import get_world_size
from torch import nn

from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic

# an evaluation computes so many in exact integers, and the others in the plain simulation
EXACT_IMAGES = 1000


@contextmanager
def first_images_exact(detector: nn.Module, images: int = EXACT_IMAGES) -> Iterator[None]:
    """While it lasts, a calibrated quantized detector computes as integer kernels do, until it has seen so many images.

    From the next batch on it is the plain simulation, which adds float32 numbers: 1 in a million codes differs, at
    random, and it takes a third of the time.

    Args:
        detector: See :func:`mmdet_ptq.deploy.integers.arithmetic.integer_arithmetic`.
        images: How many, of all processes together. Defaults to :data:`EXACT_IMAGES`.
    """
    left = -(-images // get_world_size())

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal left
        if left <= 0:
            exact.close()
        left -= len(args[0] if args else kwargs['inputs'])

    with ExitStack() as exact:
        exact.enter_context(integer_arithmetic(detector))
        handle = detector.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
