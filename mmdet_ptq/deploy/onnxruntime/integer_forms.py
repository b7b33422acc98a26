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
    layers,
    only_consumer,
    produced_by,
    take_place,
)

_CHANNELS_LAST, _CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


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


def products_by_pixel(graph: ir.Graph) -> int:
    """Writes pointwise convolutions that end in float as matrix products: a convolution's kernel writes codes only.

    A Gemm of pixels adds its bias among the integers, and hands the sums on as floats. A bias that is none of them is
    added behind a MatMul.

    Args:
        graph: Changed in place, its biases rounded already.

    Returns:
        How many convolutions were changed.
    """
    weights: dict[ir.Value, ir.Value] = {}
    changed = 0
    for layer in layers(graph):
        node = layer.node
        if node.op_type != 'Conv' or not layer.integer or not _is_pointwise(node) or _is_quantized(node.outputs[0]):
            continue
        codes, scale, shape = constant(layer.weight.inputs[0]), constant(layer.source.inputs[1]), node.outputs[0].shape
        bias = _number(layer.bias)
        if codes is None or codes.dtype != np.int8 or scale.ndim or (layer.bias is not None and bias is None):
            continue
        name, weight = node.name, layer.weight.outputs[0]
        if weight not in weights:
            weights[weight] = _as_matrix(graph, layer.weight, codes)
        # the codes are moved, so that nothing stands between their DequantizeLinear and the product
        byte = dict(dtype=layer.source.inputs[0].dtype)
        moved = add_node(
            node, 'Transpose', layer.source.inputs[:1], f'{name}_codes_last', dict(perm=_CHANNELS_LAST), **byte
        )
        rows = shape is not None and (layer.bias is None or produced_by(layer.bias, 'DequantizeLinear') is not None)
        if rows:
            flat = add_constant(graph, f'{name}_rows', np.array([-1, codes.shape[1]]))
            pixels = add_node(node, 'Reshape', [moved, flat], f'{name}_codes_by_pixel', **byte)
            pixels = add_node(node, 'DequantizeLinear', [pixels, *layer.source.inputs[1:]], f'{name}_by_pixel')
            bias_input = [] if layer.bias is None else [layer.bias]
            out = add_node(node, 'Gemm', [pixels, weights[weight], *bias_input], f'{name}_product')
            product = out.producer()
            out = add_node(node, 'Reshape', [out, _image_shape(graph, node, moved, len(codes))], f'{name}_image')
        else:
            pixels = add_node(node, 'DequantizeLinear', [moved, *layer.source.inputs[1:]], f'{name}_channels_last')
            out = add_node(node, 'MatMul', [pixels, weights[weight]], f'{name}_product')
            product = out.producer()
            if bias is not None:
                # a flat one would make a Gemm of it, in float
                wide = add_constant(graph, f'{name}.bias_wide', bias.reshape(1, 1, 1, -1))
                out = add_node(node, 'Add', [out, wide], f'{name}_with_bias')
        take_place(node, 'Transpose', [out], dict(perm=_CHANNELS_FIRST)).name = f'{name}_channels_first'
        product.name = name
        changed += 1
    return changed


def _image_shape(graph: ir.Graph, node: ir.Node, moved: ir.Value, channels: int) -> ir.Value:
    """What rows of pixels are shaped to: number, height and width of the image, and channels, (4,)."""
    name, sides = f'{node.name}_image_shape', list(node.outputs[0].shape)[2:]
    if all(isinstance(side, int) for side in sides):
        return add_constant(graph, name, np.array([-1, *sides, channels]))
    size = dict(dtype=ir.DataType.INT64)
    image = add_node(node, 'Shape', [moved], f'{name}_pixels', dict(start=0, end=3), **size)
    last = add_constant(graph, f'{name}_channels', np.array([channels]))
    return add_node(node, 'Concat', [image, last], name, dict(axis=0), **size)


def _is_pointwise(node: ir.Node) -> bool:
    """Whether a convolution of an image computes every pixel from that pixel alone, all channels at once."""
    shape = node.inputs[1].shape
    numbers = {name: list(value.as_ints()) for name, value in node.attributes.items() if name in ('strides', 'pads')}
    groups = node.attributes['group'].as_int() if 'group' in node.attributes else 1
    return (
        shape is not None
        and list(shape)[2:] == [1, 1]
        and groups == 1
        and all(step == 1 for step in numbers.get('strides', []))
        and not any(numbers.get('pads', []))
    )


def _is_quantized(value: ir.Value) -> bool:
    """Whether anything that reads a value quantizes it, be it behind a ReLU."""
    return any(
        reader.op_type == 'QuantizeLinear' or reader.op_type in ('Relu', 'Clip') and _is_quantized(reader.outputs[0])
        for reader in value.consumers()
    )


def _number(bias: ir.Value | None) -> np.ndarray | None:
    """What a bias stands for, be it dequantized."""
    dequantize = produced_by(bias, 'DequantizeLinear')
    if dequantize is None:
        return constant(bias)
    codes, scale = (constant(value) for value in dequantize.inputs[:2])
    return codes.astype(np.float32) * scale


def _as_matrix(graph: ir.Graph, weight: ir.Node, codes: np.ndarray) -> ir.Value:
    """A pointwise convolution's weight as the right side of a product, (in, out)."""
    name, scale = f'{weight.outputs[0].name}_matrix', constant(weight.inputs[1])
    stored = add_constant(graph, f'{name}_codes', np.ascontiguousarray(codes[:, :, 0, 0].T))
    # without one ONNX Runtime leaves some products in float
    zero = add_constant(graph, f'{name}_zero_point', np.zeros(scale.shape, np.int8))
    return add_node(
        graph[0], 'DequantizeLinear', [stored, weight.inputs[1], zero], name, dict(axis=1) if scale.ndim else {}
    )


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
