"""How much memory a network may take: by the shapes of its tensors before a runtime reads it, bounded where it runs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from mmdet_ptq.errors import PTQError
from mmdet_ptq.limits import MIB, bounded

GIB = 1 << 30
# bytes at once of any network, and more by those that it reads: attention among the pixels of a pyramid takes 100 times
# the image, and batches of images as much more
LEAST, PER_BYTE = 768 * MIB, 256
# and by each region of an image that is read inside of it
PER_REGION = 3 * MIB
# codes of a weight become numbers, which are shifted and scaled
PER_STORED = 12


@dataclass
class Step:
    """What one operation of a network reads and makes.

    Attributes:
        kind: Its type.
        reads: Names of tensors.
        makes: Name of each tensor to its bytes; None where only a run can tell.
    """

    kind: str
    reads: list[str]
    makes: dict[str, int | None]


def input_shapes(meta: dict) -> list[list[int]]:
    """The shapes that a model says it reads."""
    return meta.get('inputs') or [meta['input_shape']]


def memory_limit(shapes: Sequence[Sequence[int]], regions: int = 0) -> int:
    """Bytes that a network may take for its tensors.

    Args:
        shapes: Of what it reads, the images first.
        regions: How many of each image it reads inside of it. Defaults to 0.
    """
    return LEAST + PER_BYTE * 4 * sum(math.prod(shape) for shape in shapes) + PER_REGION * regions * shapes[0][0]


def check_memory(
    path: str | os.PathLike, steps: Sequence[Step], results: Iterable[str], meta: dict, stored: int
) -> bool:
    """Refuses a network that takes more memory at once than its images explain.

    Args:
        path: The model, for messages.
        steps: Its operations, in the order in which they run.
        results: Names of the tensors that it gives.
        meta: What the model says about itself.
        stored: Bytes of its constants, in files.

    Returns:
        Whether all sizes are known; where they are not, :meth:`mmdet_ptq.deploy.Runtime.running` keeps the limit.

    Raises:
        PTQError: It takes more; names the largest tensor.
    """
    limit, alive, taken = memory_limit(input_shapes(meta), meta.get('regions', 0)) + PER_STORED * stored, {}, 0
    ends = {name: place for place, step in enumerate(steps) for name in (*step.makes, *step.reads)}
    ends |= dict.fromkeys(results, len(steps))
    for place, step in enumerate(steps):
        made = {name: (size or 0, step.kind) for name, size in step.makes.items()}
        alive |= made
        taken += sum(size for size, _ in made.values())
        if taken > limit:
            name, (size, kind) = max(alive.items(), key=lambda entry: entry[1])
            raise PTQError(
                f'{str(path)!r} takes {taken / GIB:.1f} GiB of memory for its tensors, {size / GIB:.1f} GiB for '
                f'{name[:100]!r} ({kind[:40]}) alone, where its images need less than {limit / GIB:.1f} GiB; the file '
                'was made to do so, export it again.'
            )
        for name in {*step.makes, *step.reads}:
            if ends[name] == place:
                taken -= alive.pop(name, (0, ''))[0]
    return all(size is not None for step in steps for size in step.makes.values())


def bounds(what: str, memory: int, seconds: float | None = None) -> AbstractContextManager:
    """What a runtime may take, see :func:`mmdet_ptq.limits.bounded`.

    On a GPU runtimes reserve more addresses than there is memory, which says nothing: there nothing is bounded.
    """
    return nullcontext() if torch.cuda.is_available() else bounded(what, memory, seconds)
