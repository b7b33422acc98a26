"""Exported graphs without what nobody reads: in small detectors names and repeated numbers weigh a fifth of the file.

Nothing of it changes what a runtime computes.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from mmdet_ptq.deploy.onnx.graph import add_node, constant, layers, produced_by
from mmdet_ptq.deploy.onnx.nodes import CODES

_EVERY_SIZE = 2**31
_CONVOLUTIONS = ('Conv', 'ConvTranspose')
# what an absent attribute means; zeros and ones stand for lists of them
_DEFAULTS = dict(auto_pad='NOTSET', group=1, strides=1, dilations=1, pads=0)


def compact(model: ir.Model, calls: Collection[str]) -> None:
    """Drops names, constants and attributes that a model does not need, in place.

    Inputs, outputs, layers and codes (``ACTIVATION:codes``) keep their names.

    Args:
        model: The exported model, finished otherwise.
        calls: Names of the nodes that keep theirs.
    """
    derive_bias_scales(model.graph)
    common.DeduplicateInitializersPass(size_limit=_EVERY_SIZE)(model)
    drop_defaults(model.graph)
    shorten_names(model.graph, calls)


def derive_bias_scales(graph: ir.Graph) -> int:
    """Replaces stored scales of biases by weight scale * input scale; runtimes multiply when a session starts.

    Returns:
        How many were replaced.
    """
    replaced = 0
    for layer in layers(graph):
        bias = produced_by(layer.bias, 'DequantizeLinear')
        if bias is None or not layer.integer:
            continue
        factors = [layer.weight.inputs[1], layer.source.inputs[1]]
        weight, source = (constant(value) for value in factors)
        stored = constant(bias.inputs[1])
        # the same bits, or none: kernels want the scale to be this product
        if stored is None or source.ndim or not np.array_equal(weight * source, stored):
            continue
        scale = factors[0]
        if source != 1:
            scale = add_node(bias, 'Mul', factors, f'{layer.node.name}.bias_scale_product', like=factors[0])
        bias.replace_input_with(1, scale)
        replaced += 1
    return replaced


def drop_defaults(graph: ir.Graph) -> None:
    """Removes attributes of convolutions that say what their absence says."""
    for node in graph:
        if node.op_type not in _CONVOLUTIONS:
            continue
        for name, default in _DEFAULTS.items():
            if name in node.attributes:
                value = node.attributes[name].value
                if value == default or (isinstance(value, (tuple, list)) and set(value) == {default}):
                    node.attributes.pop(name)


def shorten_names(graph: ir.Graph, calls: Collection[str]) -> None:
    """Gives values the shortest names, most used ones first, and nodes none.

    Args:
        graph: Changed in place.
        calls: Names of the nodes that keep theirs.
    """
    values = [*graph.initializers.values(), *(out for node in graph for out in node.outputs)]
    ends = {value.name for value in (*graph.inputs, *graph.outputs)}
    free = [value for value in values if value.name not in ends and not is_codes(value)]
    taken = ends | {value.name for value in values if is_codes(value)} | _inner_names(graph)
    names = (name for name in short_names() if name not in taken)
    for value in free:
        # out of the way: a name may not be given while another value has it
        value.name = f' {value.name}'
    for value in sorted(free, key=lambda value: -len(value.uses())):
        value.name = next(names)
    for node in graph:
        if node.name not in calls:
            node.name = None


def is_codes(value: ir.Value) -> bool:
    """Whether a value is the codes of an activation, which comparisons look for by name."""
    return value.name.endswith(CODES) and produced_by(value, 'QuantizeLinear') is not None


def _inner_names(graph: ir.Graph) -> set[str]:
    """Names inside the bodies of nodes, which see the names around them."""
    inner = set()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.graph is not graph:
            inner.update(value.name for value in (*node.inputs, *node.outputs) if value is not None)
    return inner


def short_names() -> Iterator[str]:
    """a, b, ... Z, aa, ab, ..."""
    for length in itertools.count(1):
        yield from map(''.join, itertools.product(string.ascii_letters, repeat=length))
