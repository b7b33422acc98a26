"""Operations written in the form that ONNX Runtime computes fast between integer kernels; it knows no other form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmdet_ptq.deploy.integers.kernels import HARD_SIGMOID
from mmdet_ptq.deploy.onnx.channel_scales import by_channel
from mmdet_ptq.deploy.onnx.graph import (
    add_constant,
    add_node,
    axis_of,
    constant,
    only_consumer,
    produced_by,
    take_place,
)


def average_images(graph: ir.Graph) -> int:
    """Writes means over height and width as GlobalAveragePool, which has an integer kernel; ReduceMean has none.

    Args:
        graph: Changed in place.

    Returns:
        How many means were changed.
    """
    changed = 0
    for node in list(graph):
        if node.op_type != 'ReduceMean' or not _over_images(node) or _pair_around(node) is None:
            continue
        take_place(node, 'GlobalAveragePool', node.inputs[:1])
        changed += 1
    return changed


def _over_images(node: ir.Node) -> bool:
    """Whether a mean leaves one value of each channel of an image, in its place."""
    shape, axes = node.inputs[0].shape, constant(node.inputs[1]) if len(node.inputs) > 1 else None
    keeps = 'keepdims' not in node.attributes or node.attributes['keepdims'].as_int() == 1
    return keeps and axes is not None and shape is not None and sorted(axes % len(shape)) == [2, 3] and len(shape) == 4


def add_to_clip(graph: ir.Graph) -> int:
    """Writes hard sigmoids between quantizers as a sum with a constant: clip(a x + b, 0, 1), where codes end.

    The gate's codes end at 0 and 1 by themselves, and a factor goes into the scale. A sum has an integer kernel.

    Args:
        graph: Changed in place.

    Returns:
        How many hard sigmoids were changed.
    """
    changed = 0
    for node in list(graph):
        pair = _pair_around(node) if node.op_type == 'HardSigmoid' else None
        if pair is None or not _ends_with_gate(pair[1]):
            continue
        source, _ = pair
        factor, added = (
            np.float32(node.attributes[name].as_float() if name in node.attributes else default)
            for name, default in (('alpha', 0.2), ('beta', 0.5))
        )
        if (factor, added) != tuple(map(np.float32, HARD_SIGMOID)):
            continue
        scaled = _dequantize(graph, node, source.inputs[0], constant(source.inputs[1]) * factor, source.inputs[2], 'x')
        code = add_constant(graph, f'{node.name}_code', np.uint8(1))
        zero = add_constant(graph, f'{node.name}_code_zero_point', np.uint8(0))
        shift = _dequantize(graph, node, code, np.float32(added), zero, 'shift')
        take_place(node, 'Add', [scaled, shift])
        if not source.outputs[0].uses():
            graph.remove(source, safe=True)
        changed += 1
    return changed


def norms_by_channel(graph: ir.Graph) -> int:
    """Writes normalisations behind integers as a product and a sum: integer kernels have the channels last.

    ONNX Runtime normalises with the channels first, between two Transposes.

    Args:
        graph: Changed in place.

    Returns:
        How many normalisations were changed.
    """
    changed = 0
    for node in list(graph):
        x = node.inputs[0] if node.op_type == 'BatchNormalization' else None
        numbers = [constant(value) for value in node.inputs[1:5]] if x is not None else []
        if not numbers or x.shape is None or len(x.shape) != 4 or not _comes_from_integers(x):
            continue
        if any(number is None for number in numbers) or len(node.outputs) > 1:
            continue
        gamma, beta, mean, variance = numbers
        epsilon = np.float32(node.attributes['epsilon'].as_float() if 'epsilon' in node.attributes else 1e-5)
        gain = (gamma / np.sqrt(variance + epsilon)).astype(np.float32)
        shift = (beta - mean * gain).astype(np.float32)
        factor = by_channel(graph, node, f'{node.name}_gain', gain, x.shape)
        scaled = add_node(node, 'Mul', [x, factor], f'{node.name}_scaled', shape=x.shape)
        take_place(node, 'Add', [scaled, by_channel(graph, node, f'{node.name}_shift', shift, x.shape)])
        changed += 1
    return changed


def _comes_from_integers(value: ir.Value) -> bool:
    """Whether a value is dequantized, perhaps with scales per channel behind."""
    scaled = produced_by(value, 'Mul')
    return produced_by(scaled.inputs[0] if scaled else value, 'DequantizeLinear') is not None


def _ends_with_gate(quantize: ir.Node) -> bool:
    """Whether the codes of a quantizer are those from 0 to 1, so that it clips what a hard sigmoid would."""
    scale, zero = (constant(value) for value in quantize.inputs[1:3])
    return zero == 0 and abs(float(scale) * np.iinfo(zero.dtype).max - 1) < 1e-6


def _pair_around(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The DequantizeLinear and the QuantizeLinear around an operation; None unless both are bytes of one scale."""
    source, target = produced_by(node.inputs[0], 'DequantizeLinear'), only_consumer(node.outputs[0])
    if source is None or target is None or target.op_type != 'QuantizeLinear':
        return None
    for quantizer in (source, target):
        zero = constant(quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None
        if axis_of(quantizer) is not None or zero is None or zero.dtype != np.uint8:
            return None
    return source, target


def _dequantize(
    graph: ir.Graph, node: ir.Node, codes: ir.Value, scale: np.ndarray, zero: ir.Value, label: str
) -> ir.Value:
    name = f'{node.name}_{label}'
    factor = add_constant(graph, f'{name}_scale', np.asarray(scale, np.float32))
    return add_node(node, 'DequantizeLinear', [codes, factor, zero], name, shape=codes.shape)
