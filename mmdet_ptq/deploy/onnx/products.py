"""Products of two activations in an exported graph: found by what they read, and called as the detector calls them."""

from __future__ import annotations

import onnx_ir as ir

from mmdet_ptq.deploy.onnx.graph import produced_by
from mmdet_ptq.deploy.onnx.passes import MOVEMENTS
from mmdet_ptq.wrapping.names import activation_of, product_of


def name_products(graph: ir.Graph) -> dict[str, str]:
    """Names the products whose factors are quantized, in place.

    Args:
        graph: A graph whose quantizers are expanded; DequantizeLinear are called after their activations.

    Returns:
        What each was called before, to its name, see :func:`mmdet_ptq.wrapping.names.product_of`.
    """
    found = {}
    for node in graph:
        names = {_product_of(value) for value in node.inputs} if node.op_type == 'MatMul' else set()
        if len(names) == 1 and (name := names.pop()):
            found[node.name] = name
            node.name = node.outputs[0].name = name
    return found


def _product_of(value: ir.Value) -> str:
    """The product that a value is a factor of, be it moved in between."""
    node = value.producer()
    while node is not None and node.op_type in MOVEMENTS:
        value = node.inputs[0]
        node = value.producer()
    dequantize = produced_by(value, 'DequantizeLinear')
    return '' if dequantize is None else product_of(activation_of(dequantize.name.removesuffix(':value')))
