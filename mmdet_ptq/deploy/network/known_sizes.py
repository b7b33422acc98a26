"""Sizes of feature maps that mmdet keeps in tensors, with values that the exporter can read.

Deformable transformers pass the heights and widths of their maps in a tensor, and shape others by its values. While
torch.export traces, tensors have no values; these are computed at once instead and enter the graph as constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map


class _Known(Tensor):
    """A tensor that keeps its values while others are traced; so does what is computed from such tensors alone."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if all(isinstance(value, cls) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)):
                with _disable_current_modes():
                    plain = tree_map(
                        lambda value: value.as_subclass(Tensor) if isinstance(value, cls) else value, (args, kwargs)
                    )
                    found = func(*plain[0], **plain[1])
                    return tree_map(lambda value: value.as_subclass(cls) if isinstance(value, Tensor) else value, found)
            args, kwargs = tree_map(lambda value: _constant(value) if isinstance(value, cls) else value, (args, kwargs))
            return func(*args, **kwargs)


def _constant(known: _Known) -> Tensor:
    """The same for those that trace."""
    with _disable_current_modes():
        values, dtype = known.as_subclass(Tensor).tolist(), known.dtype
    return torch.tensor(values, dtype=dtype)


@contextmanager
def known_sizes() -> Iterator[None]:
    """Sizes of maps that a detector puts into tensors are known meanwhile."""

    def shape_as_tensor(tensor: Tensor) -> Tensor:
        with _disable_current_modes():
            return torch.tensor(tuple(tensor.shape)).as_subclass(_Known)

    with mock.patch.object(torch, '_shape_as_tensor', shape_as_tensor):
        yield
