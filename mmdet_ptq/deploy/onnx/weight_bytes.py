"""How many bytes of an exported model are weights: in small detectors the graph around them weighs as much."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from mmdet_ptq.deploy.requirements import ONNX, require

if TYPE_CHECKING:
    import onnx

_WEIGHTED = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
_HALF_BYTE = ('INT4', 'UINT4')


def weight_bytes(path: str | os.PathLike) -> int:
    """Size of the constants that convolutions and matrix products read, without names, shapes and activations' scales.

    Weights, or their codes with tables and scales, and biases; what several layers share counts once.

    Args:
        path: An ``.onnx`` file, quantized or not.

    Raises:
        PTQError: onnx is not installed.
    """
    require(*ONNX[:1])
    import onnx

    graph = onnx.load(os.fspath(path)).graph
    constants = {entry.name: entry for entry in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    read: set[str] = set()
    for node in graph.node:
        if node.op_type in _WEIGHTED:
            for name in node.input[1:]:
                read |= _constants_behind(name, constants, producers)
    return sum(_bytes(constants[name]) for name in read)


def _constants_behind(
    name: str, constants: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto]
) -> set[str]:
    """Names of the constants that a value is computed from; none where anything else takes part."""
    found, pending = set(), [name]
    while pending:
        name = pending.pop()
        if name in constants:
            found.add(name)
        elif name in producers:
            pending += [value for value in producers[name].input if value]
        else:
            return set()
    return found


def _bytes(entry: onnx.TensorProto) -> int:
    from onnx import TensorProto, helper

    count = math.prod(entry.dims)
    if TensorProto.DataType.Name(entry.data_type) in _HALF_BYTE:
        return -(-count // 2)
    return count * helper.tensor_dtype_to_np_dtype(entry.data_type).itemsize
