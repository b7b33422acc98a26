"""Operations that exporters do not know, made of those that all of them know, while a detector is exported.

Corner pooling is a running maximum (CornerNet), and Libra's pyramid pools to sizes that are given. The numbers are the
same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.utils import _pair

from mmdet_ptq.errors import PTQError


@contextmanager
def standard_operations() -> Iterator[None]:
    """While it lasts, such operations compute with others."""
    with (
        mock.patch.object(torch, 'cummax', _running_maximum),
        mock.patch.object(functional, 'adaptive_max_pool2d', _largest_of_cells),
    ):
        yield


def _running_maximum(input: Tensor, dim: int) -> tuple[Tensor, None]:
    """Each value and those before it, then twice as many, until it is all of them; where they are is not known."""
    # what is inside is no operation of the detector's own
    with torch._C.DisableTorchFunction():
        size, step = input.shape[dim], 1
        while step < size:
            moved = torch.cat([input.narrow(dim, 0, step), input.narrow(dim, 0, size - step)], dim)
            input, step = torch.maximum(input, moved), 2 * step
        return input, None


def _largest_of_cells(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
    if return_indices:
        raise PTQError('adaptive_max_pool2d with indices cannot be exported; leave out the export.')
    with torch._C.DisableTorchFunction():
        sizes = [
            have if want is None else want for want, have in zip(_pair(output_size), input.shape[-2:], strict=True)
        ]
        if all(have % want == 0 for want, have in zip(sizes, input.shape[-2:], strict=True)):
            return functional.max_pool2d(
                input, [have // want for want, have in zip(sizes, input.shape[-2:], strict=True)]
            )
        for dim, want in ((-2, sizes[0]), (-1, sizes[1])):
            have = input.shape[dim]
            edges = [(cell * have // want, -(-(cell + 1) * have // want)) for cell in range(want)]
            cells = [input.narrow(dim, first, end - first).amax(dim, keepdim=True) for first, end in edges]
            input = torch.cat(cells, dim)
        return input
