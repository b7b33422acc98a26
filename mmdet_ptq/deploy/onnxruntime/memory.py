"""What the tensors of an ONNX file take, by ONNX's own inference of shapes, before ONNX Runtime reads it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mmdet_ptq.deploy.network.memory import Step, check_memory, input_shapes
from mmdet_ptq.errors import PTQError

if TYPE_CHECKING:
    import onnx

# a longer constant is no shape of anything
_LONGEST_SHAPE = 64


def check_onnx_memory(path: str | os.PathLike, meta: dict) -> bool:
    """Refuses a file that takes more memory than its images explain, or that grows while it is read.

    Args:
        path: The ``.onnx`` file.
        meta: What it says about itself.

    Returns:
        Whether all sizes are known.

    Raises:
        PTQError: It does; or it has functions, sparse constants, or constants in other files.
    """
    import onnx

    model = onnx.load(os.fspath(path), load_external_data=False)
    graphs = list(_graphs(model.graph))
    if strange := _strange(model, graphs):
        raise PTQError(f'{str(path)!r} {strange}, which no export of ours does; export it again with tools/export.py.')
    for graph in graphs:
        _forget_numbers(graph)
    _set_inputs(model.graph, input_shapes(meta))
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # of any operation
        return False
    sizes = {value.name: _bytes(value) for part in _graphs(graph) for value in (*part.value_info, *part.output)}
    results, stored = [value.name for value in graph.output], Path(path).stat().st_size
    return check_memory(path, list(_steps(graph, sizes)), results, meta, stored)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all that lie within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField('g') else ()), *attribute.graphs):
                yield from _graphs(inner)


def _strange(model: onnx.ModelProto, graphs: list[onnx.GraphProto]) -> str:
    """What of a file grows while it is read, or leads out of it; '' if nothing does."""
    if model.functions:  # each may call another twice
        return 'has functions'
    attributes = [attribute for graph in graphs for node in graph.node for attribute in node.attribute]
    if any(graph.sparse_initializer for graph in graphs) or any(
        attribute.HasField('sparse_tensor') or attribute.sparse_tensors for attribute in attributes
    ):
        return 'has sparse constants'
    tensors = [tensor for graph in graphs for tensor in graph.initializer]
    tensors += [t for attribute in attributes for t in (attribute.t, *attribute.tensors)]
    outside = next((tensor.name for tensor in tensors if tensor.data_location or tensor.external_data), None)
    return '' if outside is None else f'keeps its weights {outside[:100]!r} in another file'


def _forget_numbers(graph: onnx.GraphProto) -> None:
    """Leaves, in place, what shapes are inferred from: not the weights, and no shape that the file tells itself."""
    for node in graph.node:
        if node.op_type == 'GroupNormalization':  # onnx (1.23) does not know that it keeps the shape
            node.op_type = 'Identity'
            del node.input[1:], node.attribute[:]
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > _LONGEST_SHAPE:
            name, kind, dims = tensor.name, tensor.data_type, list(tensor.dims)
            tensor.Clear()
            tensor.name, tensor.data_type = name, kind
            tensor.dims.extend(dims)
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField('shape')


def _set_inputs(graph: onnx.GraphProto, shapes: list[list[int]]) -> None:
    """Gives, in place, what the graph leaves open of its inputs."""
    for value, shape in zip(graph.input, shapes, strict=False):
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, shape, strict=False):
            if not dim.HasField('dim_value'):
                dim.dim_value = size


def _bytes(value: onnx.ValueInfoProto) -> int | None:
    from onnx import helper

    kind = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField('dim_value') else -1 for dim in kind.shape.dim]
    if not kind.HasField('shape') or min(dims, default=0) < 0:
        return None
    return math.prod(dims) * helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize


def _steps(graph: onnx.GraphProto, sizes: dict[str, int | None]) -> Iterator[Step]:
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField('g') else ()), *attribute.graphs):
                yield from _steps(inner, sizes)
        yield Step(node.op_type, list(node.input), {name: sizes.get(name) for name in node.output if name})
