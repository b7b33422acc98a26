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
from torch.utils._pytree import tree_map_only

from mmdet_ptq.wrapping.watching.tensors import tensors_in


class _Known(Tensor):
    """A tensor that keeps its values while others are traced; so does what is computed from such tensors alone."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if all(isinstance(tensor, cls) for tensor in tensors_in((args, kwargs))):
                with _disable_current_modes():
                    args, kwargs = tree_map_only(cls, lambda value: value.as_subclass(Tensor), (args, kwargs))
                    return tree_map_only(Tensor, lambda value: value.as_subclass(cls), func(*args, **kwargs))
            args, kwargs = tree_map_only(cls, _constant, (args, kwargs))
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
