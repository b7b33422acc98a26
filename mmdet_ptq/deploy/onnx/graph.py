"""Reading and changing an ONNX graph in onnx_ir: names by layer, constants, quantize / dequantize pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from mmdet_ptq.wrapping.names import call_name

SCOPES = 'pkg.torch.onnx.name_scopes'
CALL = 'mmdet_ptq.call'
ROOT = 'detector.'
_SELF = 'L__self__'  # as torch calls what it exports
WEIGHTED = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
# they have a weight, too, which no runtime computes with in integers
_FLOAT_ONLY = ('DeformConv',)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """A value's numbers, if it is an initializer."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def add_constant(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """A new initializer; a name that is taken gets a number."""
    unique, number = name, 1
    while unique in graph.initializers:
        number += 1
        unique = f'{name}_{number}'
    tensor = ir.tensor(array, dtype=dtype, name=unique)
    value = ir.Value(name=unique, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    graph.register_initializer(value)
    return value


def add_node(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Mapping[str, Any] | None = None,
    *,
    shape: ir.Shape | None = None,
    dtype: ir.DataType | None = ir.DataType.FLOAT,
    like: ir.Value | None = None,
) -> ir.Value:
    """Puts a node in front of another one and returns its output, which has its name.

    Args:
        before: The other node.
        op_type: What it computes.
        inputs: What it reads.
        name: Its name.
        attributes: Its attributes. Defaults to none.
        shape: Shape of the output. Defaults to None: not told.
        dtype: Type of the output; None tells nothing. Defaults to float32.
        like: A value of the output's shape and type, instead of these. Defaults to None.
    """
    node = ir.node(op_type, inputs, attributes or {}, name=name)
    out = node.outputs[0]
    out.name, out.shape, out.type = name, shape, None if dtype is None else ir.TensorType(dtype)
    if like is not None:
        out.shape, out.type = like.shape, like.type
    before.graph.insert_before(before, node)
    return out


def add_behind(value: ir.Value, op_type: str, inputs: Sequence[ir.Value | None], name: str) -> ir.Node:
    """Puts a node behind a value: who read the value reads what the node makes of it.

    Args:
        value: Its first input, whose shape and type its output has.
        op_type: What it computes.
        inputs: What else it reads.
        name: Its name, and its output's.
    """
    node, producer = ir.node(op_type, [value, *inputs], name=name), value.producer()
    out = node.outputs[0]
    out.name, out.shape, out.type = name, value.shape, value.type
    value.replace_all_uses_with(out, replace_graph_outputs=True)
    node.replace_input_with(0, value)
    producer.graph.insert_after(producer, node)
    return node


def take_place(
    old: ir.Node, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None
) -> ir.Node:
    """Puts a node in the place of another one, under its name, and returns it."""
    before = old.outputs[0]
    name, out = before.name, add_node(old, op_type, inputs, old.name, attributes, like=before)
    before.replace_all_uses_with(out, replace_graph_outputs=True)
    old.graph.remove(old, safe=True)
    out.name = name
    return out.producer()


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value; None where there are several or it is an output of the graph."""
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 and len(value.uses()) == 1 and not value.is_graph_output() else None


def produced_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes a value, if it is of the given type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def axis_of(node: ir.Node, default: int | None = None) -> int | None:
    """The attribute ``axis``."""
    return node.attributes['axis'].as_int() if 'axis' in node.attributes else default


@dataclass
class Layer:
    """A convolution or matrix product with its quantize / dequantize pairs.

    Attributes:
        node: The operation.
        source: DequantizeLinear of its input; None where that is float.
        weight: DequantizeLinear of its weight; None where that is float.
        bias: The bias; None without one.
    """

    node: ir.Node
    source: ir.Node | None
    weight: ir.Node | None
    bias: ir.Value | None

    @property
    def integer(self) -> bool:
        return self.source is not None and self.weight is not None


def layers(graph: ir.Graph) -> Iterator[Layer]:
    """Every convolution and matrix product, in the order of the graph."""
    for node in list(graph):
        if node.op_type in WEIGHTED:
            inputs = list(node.inputs) + [None]
            yield Layer(
                node, produced_by(inputs[0], 'DequantizeLinear'), produced_by(inputs[1], 'DequantizeLinear'), inputs[2]
            )


def own_constants(graph: ir.Graph) -> None:
    """Gives a graph the constants that its nodes read: onnxscript (0.7) loses one of two clips of the same tensor."""
    for node in graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.producer() is None:
                if value.name not in graph.initializers:
                    graph.register_initializer(value)


def note_calls(program: torch.onnx.ONNXProgram, detector: nn.Module) -> None:
    """Notes in each node which call of its layer it is of, 0 for the first one.

    Torch counts calls whose results nobody reads, too, and drops them later. Those of a layer with several
    paths it counts by path; they are numbered as they were traced: the graph lacks those that repeat others.

    Args:
        program: As torch exports it.
        detector: The detector that was exported.
    """
    layers = _first_paths(detector)
    stacks = {node.name: list(node.meta.get('nn_module_stack') or {}) for node in program.exported_program.graph.nodes}
    traced: dict[str, dict[str, int]] = {}

    def layer_of(call: str) -> str:
        path = call.partition('@')[0].removeprefix(_SELF).removeprefix(ROOT)
        return layers.get(path, path)

    for call in (stack[-1] for stack in stacks.values() if stack):
        numbers = traced.setdefault(layer_of(call), {})
        numbers.setdefault(call, len(numbers))
    several = {layer for layer, calls in traced.items() if len({call.partition('@')[0] for call in calls}) > 1}
    for node in program.model.graph:
        call = (stacks.get((_scopes(node) or [''])[-1]) or [''])[-1]
        if call:
            layer = layer_of(call)
            number = traced[layer][call] if layer in several else call.partition('@')[2] or 0
            node.metadata_props[CALL] = str(number)


def _first_paths(detector: nn.Module) -> dict[str, str]:
    """Every path of a module to the one that the detector names it by."""
    first = {module: name for name, module in detector.named_modules()}
    return {name: first[module] for name, module in detector.named_modules(remove_duplicate=False) if name}


def _scopes(node: ir.Node) -> list[str]:
    return json.loads(node.metadata_props.get(SCOPES, '[]').replace("'", '"'))


def name_layers(graph: ir.Graph, detector: nn.Module) -> dict[str, str]:
    """Names operations after the detector's layers instead of after the exporter's counters.

    Torch tells a module by the path that it was reached by, of which a shared one has several, and which begins at the
    detector itself where its forward is a bound method. The layer is called as the detector names it first.

    Args:
        graph: A graph as torch exports it, with its scopes in the nodes' metadata. Calls that :func:`note_calls` did
            not note are numbered as they stand in the graph, as are those of layers that compute several operations.
        detector: The detector that was exported.

    Returns:
        Name of each convolution or matrix product to the layer in the detector it is a call of.
    """
    known = _first_paths(detector)
    found: dict[str, list[tuple[ir.Node, str | None]]] = {}
    for node in graph:
        paths = [path for path in (scope.removeprefix(ROOT) for scope in _scopes(node)) if path in known]
        if node.op_type in WEIGHTED + _FLOAT_ONLY and paths:
            found.setdefault(known[paths[-1]], []).append((node, node.metadata_props.get(CALL)))
    named = {}
    for layer, nodes in found.items():
        told = {number for _, number in nodes}
        certain = len(told) == len(nodes) and None not in told
        for place, (node, number) in enumerate(nodes):
            node.name = call_name(layer, int(number) if certain else place)
            # runtimes call what computes an output after the output
            node.outputs[0].name = node.name
            named[node] = layer
    return {node.name: named[node] for node in graph if node in named}
