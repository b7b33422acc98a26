"""Which layers of an exported graph add products that do not fit 16 bits: what x86 without VNNI computes wrongly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from mmdet_ptq.deploy.onnx.graph import constant, layers, produced_by
from mmdet_ptq.quantizers import SUM_LIMIT, Neighbours


def saturating_layers(graph: ir.Graph) -> list[str]:
    """Names of the layers' calls in which two neighbouring products may leave 16 bits.

    The order of a weight is the graph's own, whatever an export made of the detector's.

    Args:
        graph: After all that changes weights, before they are packed.
    """
    found, known = [], {}
    for layer in layers(graph):
        weight = None if layer.weight is None else constant(layer.weight.inputs[0])
        if not layer.integer or weight is None or weight.dtype != np.int8:
            continue
        rows = _rows(layer.node, weight)
        if rows is None:
            continue
        key = layer.weight.inputs[0], rows.kernel, rows.channels
        if key not in known:
            neighbours = Neighbours(rows.channels, rows.kernel)
            known[key] = float(neighbours.largest_sum(torch.from_numpy(rows.values.astype(np.float32))).max())
        if known[key] * _highest_code(layer.source) > SUM_LIMIT * 255:
            found.append(layer.node.name)
    return found


@dataclass
class _Rows:
    """A weight, an output channel a row.

    Attributes:
        values: Shape (C, K).
        channels: Input channels of an output channel.
        kernel: Size of the kernel.
    """

    values: np.ndarray
    channels: int
    kernel: tuple[int, ...]


def _rows(node: ir.Node, weight: np.ndarray) -> _Rows | None:
    """The weight in rows; None where kernels add every product in 32 bits, as depthwise ones do."""
    if node.op_type not in ('Conv', 'ConvTranspose'):
        transposed = node.op_type == 'Gemm' and 'transB' in node.attributes and node.attributes['transB'].as_int()
        columns = weight.reshape(-1, *weight.shape[-2:])
        values = weight if transposed else columns.transpose(0, 2, 1).reshape(-1, weight.shape[-2])
        return _Rows(values, values.shape[1], ())
    groups = node.attributes['group'].as_int() if 'group' in node.attributes else 1
    if node.op_type == 'ConvTranspose':
        if groups > 1:
            return None
        weight = weight.swapaxes(0, 1)
    if weight.shape[1] == 1 and groups == weight.shape[0] > 1:
        return None
    return _Rows(weight.reshape(len(weight), -1), weight.shape[1], weight.shape[2:])


def _highest_code(source: ir.Node) -> int:
    """The highest code of a layer's input, by its type and by the clip in front of it."""
    zero = constant(source.inputs[2]) if len(source.inputs) > 2 else None
    # signed bytes are made unsigned by adding 128; with 16 bits a layer computes in float
    highest = 255 if zero is None or zero.dtype.itemsize == 1 else 0
    clip = produced_by(source.inputs[0], 'Clip')
    bound = None if clip is None or len(clip.inputs) < 3 else constant(clip.inputs[2])
    return highest if bound is None else min(highest, int(bound))
