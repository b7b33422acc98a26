"""Layers that share a weight get one each: what ONNX Runtime needs where it turns int8 weights into uint8.

It names the new weight after the old one, so that the second layer of a shared head would add the same name again, and
the session does not open. Nothing is stored twice: this is done to the graph in memory.
"""
from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .onnx_graph import WEIGHTED, add_constant


def with_own_weights(model: str | bytes) -> str | bytes:
    """A model in which no two layers share a weight.

    Args:
        model: Path of the model, or the serialized model.

    Returns:
        The serialized model; what was given where no layers share a weight.
    """
    given, model = model, ir.from_proto(onnx.load_from_string(model)) if isinstance(model, bytes) else ir.load(model)
    taken, found = set(), False
    for node in list(model.graph):
        if node.op_type not in WEIGHTED:
            continue
        codes = _codes(node.inputs[1])
        if codes is None:
            continue
        if codes in taken:
            node.replace_input_with(1, _copied(node.inputs[1], node, model.graph))
            found = True
        taken.add(codes)
    if not found:
        return given
    # operations that nobody reads any more would still share the codes
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model).SerializeToString()


def _codes(value: ir.Value) -> ir.Value | None:
    """The constant that a weight is made of: its codes, or the levels that they are looked up in.

    None where there is none, as in a product of two activations.
    """
    while value.producer() is not None:
        if not value.producer().inputs:
            return None
        value = value.producer().inputs[0]
    return value if value.const_value is not None else None


def _copied(value: ir.Value, reader: ir.Node, graph: ir.Graph) -> ir.Value:
    """A weight of its own for one reader, with the operations that make it."""
    producer = value.producer()
    if producer is None:
        return add_constant(graph, value.name, value.const_value.numpy(), value.dtype)
    node = ir.node(producer.op_type, [_copied(producer.inputs[0], reader, graph), *producer.inputs[1:]],
                   producer.attributes, name=f'{reader.name}/{producer.op_type}')
    copy = node.outputs[0]
    copy.name, copy.type, copy.shape = f'{reader.outputs[0].name}/{producer.op_type}', value.type, value.shape
    graph.insert_before(reader, node)
    return copy
