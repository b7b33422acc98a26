"""What is written into a slice of a tensor, as a Concat of what stays and what is new.

The exporter makes a ScatterND between two Transposes of it. Behind a chain of these OpenVINO (2026.4) computes a
quantized layer wrongly, as in DAB-DETR, whose decoder scales halves of its positions one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def slice_translations() -> dict[Callable, Callable]:
    """What ``torch.onnx.export`` is to write in place of its own, as ``custom_translation_table``."""
    return {torch.ops.aten.slice_scatter.default: _slice_scatter}


def _slice_scatter(self: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    from onnxscript import opset21 as op
    from onnxscript.function_libs.torch_lib.ops.core import aten_slice_scatter

    size = self.shape[dim]
    known = all(isinstance(value, int) for value in (size, step, *(x for x in (start, end) if x is not None)))
    if not known or step != 1:
        return aten_slice_scatter(self, src, dim, start, end, step)
    first, last, _ = slice(start, end).indices(size)
    last = max(first, last)
    parts = [op.Slice(self, [0], [first], [dim])] if first > 0 else []
    parts += [src, *([op.Slice(self, [last], [size], [dim])] if last < size else [])]
    return op.Concat(*parts, axis=dim)
