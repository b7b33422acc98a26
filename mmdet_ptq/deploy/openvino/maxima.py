"""Maxima and minima that OpenVINO would round: in front of a quantizer its CPU kernels write them as whole numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmdet_ptq.deploy.onnx.graph import add_constant, constant

_LARGEST = {'ReduceMax': 1, 'ReduceMin': 0}


def sort_for_maxima(graph: ir.Graph) -> int:
    """Computes maxima and minima that a quantizer depends on as the first of sorted values, one axis after another.

    OpenVINO 2026.4.1 gives ReduceMax bytes for its output where a FakeQuantize follows, also behind a concatenation,
    and rounds before it scales; TopK is exact.

    Returns:
        How many there were.
    """
    quantized = _ancestors([node for node in graph if node.op_type == 'QuantizeLinear'])
    found = [
        node
        for node in graph
        if node.op_type in _LARGEST and node in quantized and node.inputs[0].type == ir.TensorType(ir.DataType.FLOAT)
    ]
    one = add_constant(graph, 'one_of_them', np.array([1], np.int64)) if found else None
    return sum(_sorted(graph, node, one) for node in found)


def _ancestors(nodes: list[ir.Node]) -> set[ir.Node]:
    """All nodes that something of what is given is made of."""
    known: set[ir.Node] = set()
    while nodes:
        producers = {value.producer() for value in nodes.pop().inputs if value is not None} - {None}
        nodes += producers - known
        known |= producers
    return known


def _sorted(graph: ir.Graph, node: ir.Node, one: ir.Value) -> bool:
    value, out = node.inputs[0], node.outputs[0]
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if axes is None:
        if value.shape is None:
            return False
        axes = np.arange(len(value.shape))
    for axis in axes.flatten().tolist():
        attributes = dict(axis=axis, largest=_LARGEST[node.op_type], sorted=0)
        largest = ir.node('TopK', [value, one], attributes, num_outputs=2, name=f'{node.name}/{axis}')
        for number, dtype in enumerate((ir.DataType.FLOAT, ir.DataType.INT64)):
            largest.outputs[number].name = f'{out.name}/{axis}/{number}'
            largest.outputs[number].type = ir.TensorType(dtype)
        graph.insert_before(node, largest)
        value = largest.outputs[0]
    if 'keepdims' in node.attributes and not node.attributes['keepdims'].as_int():
        squeezed = add_constant(graph, f'{out.name}/axes', axes.astype(np.int64).flatten())
        squeeze = ir.node('Squeeze', [value, squeezed], name=f'{node.name}/squeezed')
        graph.insert_before(node, squeeze)
        value = squeeze.outputs[0]
        value.name = f'{out.name}/squeezed'
    value.shape, value.type = out.shape, out.type
    out.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True
