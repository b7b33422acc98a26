"""Per-channel activation scales moved into the weights of the convolutions around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mmdet_ptq.deploy.integers.kernels import SLACK
from mmdet_ptq.deploy.onnx.graph import (
    Layer,
    add_behind,
    add_constant,
    add_node,
    axis_of,
    constant,
    layers,
    only_consumer,
    produced_by,
)


def absorb_channel_scales(graph: ir.Graph, outputs: bool = True) -> None:
    """Moves per-channel activation scales out of quantize / dequantize pairs: kernels take one scale per tensor.

    A convolution that writes the tensor divides its weights and bias by the scales, and the codes then mean
    themselves. Depthwise convolutions, which read each channel by itself, multiply theirs; whoever else reads the
    tensor gets it multiplied.

    Args:
        graph: Changed in place.
        outputs: Also where the graph ends. Without, what is put out is dequantized with its scales per channel, which
            costs as little as one scale there. Defaults to True.
    """
    for node in list(graph):
        if node.op_type != 'DequantizeLinear' or axis_of(node) != 1 or len(node.inputs) < 3:
            continue
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
        quantize = _quantizer_of(node)
        if scale.ndim != 1 or quantize is None:
            continue
        if (zero != zero[0]).any():
            reading = [layer for layer in layers(graph) if layer.source is node]
            if _can_pad(quantize, node, reading):
                _pad_before(graph, quantize, node, reading)
            else:
                _spell_out(graph, node, scale, zero)
            continue
        one = add_constant(graph, f'{node.name}_scale', np.float32(1))
        point = add_constant(graph, f'{node.name}_zero_point', zero[:1].reshape(()))
        if outputs or node.outputs[0].uses():
            _absorb_in_readers(graph, node, scale)
            _per_tensor(node, one, point)
        if _quantizer_readers(quantize) == [node]:
            _absorb_in_producer(graph, quantize, scale, one, point)


def fold_affine(graph: ir.Graph) -> int:
    """Moves normalisations, factors and summands behind one call of a convolution into its weight scale and bias.

    Normalisations stand there where several share a convolution, so that no weight in the detector could take them
    over, factors where a head's outputs are in units of the stride, both in front of a hard sigmoid. OpenVINO folds
    them, too, but into weights that are float then, or under a name that is not the layer's.

    Args:
        graph: Changed in place.

    Returns:
        How many were moved.
    """
    moved = 0
    for node in list(graph):
        found = _affine(node)
        convolution = None if found is None else found.source
        weight = None if convolution is None else produced_by(convolution.inputs[1], 'DequantizeLinear')
        if weight is None or only_consumer(convolution.outputs[0]) is not node:
            continue
        bias = constant(convolution.inputs[2]) if len(convolution.inputs) > 2 else np.float32(0)
        codes = constant(weight.inputs[0])
        if bias is None or found.gain.size not in (1, len(codes)):
            continue
        if codes.ndim != 4 and node.op_type != 'BatchNormalization' and found.gain.size + found.shift.size > 2:
            continue  # three axes from the right are channels, rows and columns only there
        if (found.gain != 1).any():
            # scales are positive: the codes change their sign
            turned = codes.astype(np.int64) * np.sign(found.gain).astype(np.int64).reshape(-1, *[1] * (codes.ndim - 1))
            if turned.max() > np.iinfo(codes.dtype).max:
                continue
            own = _scale_weight(graph, convolution, np.where(found.gain == 0, 1, np.abs(found.gain)))
            # codes of its own even where no sign changes: OpenVINO makes weights float that have two scales
            own.replace_input_with(0, add_constant(graph, f'{convolution.name}.weight', turned.astype(codes.dtype)))
        shifted = np.broadcast_to(bias * found.gain + found.shift, len(codes)).astype(np.float32)
        convolution.resize_inputs(3)
        convolution.replace_input_with(2, add_constant(graph, f'{convolution.name}.bias', shifted))
        node.outputs[0].replace_all_uses_with(convolution.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        moved += 1
    return moved


@dataclass
class _Affine:
    """What a node does with the output of a convolution, channel by channel: ``gain * x + shift``."""

    source: ir.Node
    gain: np.ndarray
    shift: np.ndarray


def _affine(node: ir.Node) -> _Affine | None:
    if node.op_type == 'BatchNormalization':
        source, numbers = produced_by(node.inputs[0], 'Conv'), [constant(value) for value in node.inputs[1:5]]
        if source is None or any(n is None for n in numbers):
            return None
        gamma, beta, mean, variance = (n.astype(np.float64) for n in numbers)
        epsilon = node.attributes['epsilon'].as_float() if 'epsilon' in node.attributes else 1e-5
        gain = gamma / np.sqrt(variance + epsilon)
        return _Affine(source, gain, beta - mean * gain)
    if node.op_type == 'Neg':
        source = produced_by(node.inputs[0], 'Conv')
        return None if source is None else _Affine(source, np.array([-1.0]), np.zeros(1))
    if node.op_type not in ('Mul', 'Add', 'Sub', 'Div'):
        return None
    for place, value in enumerate(node.inputs[: 1 if node.op_type == 'Div' else 2]):
        source, number = produced_by(value, 'Conv'), constant(node.inputs[1 - place])
        # one number, or one for each channel: (C, 1, 1) and (1, C, 1, 1)
        if source is None or number is None or (node.op_type == 'Div' and not number.all()):
            continue
        if number.size == 1 or number.shape[-3:] == (number.size, 1, 1):
            number = number.astype(np.float64).reshape(-1)
            if node.op_type == 'Add':
                return _Affine(source, np.ones(1), number)
            if node.op_type == 'Sub':
                return _Affine(source, np.ones(1), -number) if place == 0 else _Affine(source, -np.ones(1), number)
            return _Affine(source, number if node.op_type == 'Mul' else 1 / number, np.zeros(1))
    return None


def _quantizer_of(dequantize: ir.Node) -> ir.Node | None:
    """QuantizeLinear that writes what a node dequantizes, perhaps behind a clip of the codes."""
    clip = produced_by(dequantize.inputs[0], 'Clip')
    return produced_by(clip.inputs[0] if clip is not None else dequantize.inputs[0], 'QuantizeLinear')


def _quantizer_readers(quantize: ir.Node) -> list[ir.Node]:
    readers = list(quantize.outputs[0].consumers())
    return [
        inner
        for reader in readers
        for inner in (reader.outputs[0].consumers() if reader.op_type == 'Clip' else [reader])
    ]


def _absorb_in_readers(graph: ir.Graph, dequantize: ir.Node, scale: np.ndarray) -> None:
    out = dequantize.outputs[0]
    reading = [layer for layer in layers(graph) if layer.source is dequantize]
    if (
        len(reading) == len(out.uses())
        and not out.is_graph_output()
        and all(_is_depthwise(layer, len(scale)) for layer in reading)
    ):
        for layer in reading:
            _scale_weight(graph, layer.node, scale)
        return
    scaled = add_behind(out, 'Mul', [None], f'{dequantize.name}_scaled')
    scaled.replace_input_with(1, by_channel(graph, scaled, f'{dequantize.name}_factor', scale, out.shape))


def _can_pad(quantize: ir.Node, dequantize: ir.Node, reading: list[Layer]) -> bool:
    """Whether depthwise convolutions that pad alike are all that reads a tensor, and no convolution writes it."""
    channels, pads = constant(dequantize.inputs[1]).size, {_pads(layer.node) for layer in reading}
    return (
        len(reading) == len(dequantize.outputs[0].uses())
        and len(pads) == 1
        and None not in pads
        and all(_is_depthwise(layer, channels) for layer in reading)
        and _quantizer_readers(quantize) == [dequantize]
        and produced_by(quantize.inputs[0], 'Conv') is None
    )


def _pads(convolution: ir.Node) -> tuple[int, ...] | None:
    return tuple(convolution.attributes['pads'].as_ints()) if 'pads' in convolution.attributes else None


def _pad_before(graph: ir.Graph, quantize: ir.Node, dequantize: ir.Node, reading: list[Layer]) -> None:
    """Gives depthwise convolutions the codes themselves where each channel has its own zero point.

    sum w (q - z_c) = sum w q - z_c sum w, of which the second part is a bias; but the border is z_c, too, which no
    kernel pads with: the values are padded before they are quantized, and the convolutions pad no more.
    """
    scale, zero = (constant(value) for value in dequantize.inputs[1:3])
    pads = _pads(reading[0].node)
    if any(pads):
        half = len(pads) // 2
        first, last = [0, 0, *pads[:half]], [0, 0, *pads[half:]]
        ends = add_constant(graph, f'{quantize.name}_pads', np.array([*first, *last], np.int64))
        padded = add_node(quantize, 'Pad', [quantize.inputs[0], ends], f'{quantize.name}_padded')
        quantize.replace_input_with(0, padded)
        sizes = [
            size + more + less if isinstance(size, int) else size
            for size, more, less in zip(quantize.outputs[0].shape, first, last, strict=True)
        ]
        for value in {quantize.outputs[0], dequantize.inputs[0], dequantize.outputs[0]}:
            value.shape = ir.Shape(sizes)
    for layer in reading:
        layer.node.attributes['pads'] = ir.AttrInt64s('pads', [0] * len(pads))
        _add_to_bias(graph, layer, scale, zero)
    _divide_before(graph, quantize, scale, zero)
    for node in (quantize, dequantize):
        _per_tensor(
            node,
            add_constant(graph, f'{node.name}_scale', np.float32(1)),
            add_constant(graph, f'{node.name}_zero_point', np.zeros((), zero.dtype)),
        )


def _add_to_bias(graph: ir.Graph, layer: Layer, scale: np.ndarray, zero: np.ndarray) -> None:
    """Moves scales and zero points of a depthwise convolution's input into its weight and its bias."""
    sums = constant(layer.weight.inputs[0]).astype(np.int64).reshape(len(scale), -1).sum(1)
    step = constant(_scale_weight(graph, layer.node, scale).inputs[1]).astype(np.float64)
    bias = 0 if layer.bias is None else constant(layer.bias).astype(np.float64)
    moved = (bias - zero.astype(np.int64) * sums * step).astype(np.float32)
    layer.node.resize_inputs(3)
    layer.node.replace_input_with(2, add_constant(graph, f'{layer.node.name}.bias', moved))


def _spell_out(graph: ir.Graph, dequantize: ir.Node, scale: np.ndarray, zero: np.ndarray) -> None:
    """Dequantizes in float operations: fusing with a scale or zero point per channel makes ONNX Runtime fail."""
    out = dequantize.outputs[0]
    centre, factor = (
        by_channel(graph, dequantize, f'{dequantize.name}_{label}', array, out.shape)
        for label, array in (('centre', zero.astype(np.float32)), ('factor', scale))
    )
    value = dequantize.inputs[0]
    for op_type, other, label in (('Cast', [], 'cast'), ('Sub', [centre], 'centred'), ('Mul', [factor], 'scaled')):
        attributes = dict(to=ir.DataType.FLOAT) if op_type == 'Cast' else {}
        value = add_node(dequantize, op_type, [value, *other], f'{dequantize.name}_{label}', attributes, dtype=None)
    out.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(dequantize, safe=True)


def by_channel(graph: ir.Graph, before: ir.Node, name: str, array: np.ndarray, shape: ir.Shape) -> ir.Value:
    """A constant per channel, shaped to be combined with a tensor.

    Along the last axis it is repeated when the session starts: with the channels last, ONNX Runtime combines one row of
    pixels at once then instead of one pixel, five times as fast.
    """
    value = add_constant(graph, name, array.reshape(-1, *[1] * (len(shape) - 2)))
    if len(shape) < 4 or not isinstance(shape[-1], int):
        return value
    row = [len(array), *[1] * (len(shape) - 3), shape[-1]]
    size = add_constant(graph, f'{name}_shape', np.array(row, np.int64))
    return add_node(before, 'Expand', [value, size], f'{name}_repeated', shape=ir.Shape(row))


def _is_depthwise(layer: Layer, channels: int) -> bool:
    group = layer.node.attributes.get('group')
    return (
        layer.node.op_type == 'Conv'
        and group is not None
        and group.as_int() == channels
        and layer.weight is not None
        and layer.weight.inputs[0].shape[0] == channels
    )


def _absorb_in_producer(graph: ir.Graph, quantize: ir.Node, scale: np.ndarray, one: ir.Value, zero: ir.Value) -> None:
    _relu_before(quantize, scale)
    last = produced_by(quantize.inputs[0], 'Relu') or quantize
    producer = produced_by(last.inputs[0], 'Conv')
    weight = None if producer is None else produced_by(producer.inputs[1], 'DequantizeLinear')
    if weight is None or only_consumer(producer.outputs[0]) is not last or len(last.outputs[0].uses()) > 1:
        _divide_before(graph, quantize, scale)
        _per_tensor(quantize, one, zero)
        return
    bias = constant(producer.inputs[2]) if len(producer.inputs) > 2 else np.zeros(len(scale), np.float32)
    _divide_output(graph, producer, bias, scale)
    _per_tensor(quantize, one, zero)


def _divide_output(graph: ir.Graph, convolution: ir.Node, bias: np.ndarray, factor: np.ndarray) -> None:
    """Divides what a convolution writes, channel by channel, in its weight and its bias."""
    _scale_weight(graph, convolution, 1 / factor)
    convolution.resize_inputs(3)
    convolution.replace_input_with(
        2, add_constant(graph, f'{convolution.name}.bias', (bias / factor).astype(np.float32))
    )


def _relu_before(quantize: ir.Node, scale: np.ndarray) -> None:
    """Turns a ReLU6 whose upper end the quantizer repeats into a ReLU, through which positive factors pass."""
    clip = produced_by(quantize.inputs[0], 'Clip')
    if clip is None or only_consumer(clip.outputs[0]) is not quantize:
        return
    low, high = (constant(value) for value in (*clip.inputs, None, None)[1:3])
    zero = constant(quantize.inputs[2]).astype(np.float64)
    top = np.iinfo(constant(quantize.inputs[2]).dtype).max
    if low is None or high is None or float(low) != 0 or (float(high) / scale + zero < top - SLACK).any():
        return
    relu = add_node(clip, 'Relu', clip.inputs[:1], f'{quantize.name}_relu', shape=clip.outputs[0].shape)
    quantize.replace_input_with(0, relu)
    clip.graph.remove(clip, safe=True)


def _divide_before(graph: ir.Graph, quantize: ir.Node, scale: np.ndarray, zero: np.ndarray | None = None) -> None:
    """Scales each channel, and moves it to its zero point, before one scale quantizes all.

    ONNX Runtime computes depthwise convolutions with the channels last, where its quantization per channel takes a
    hundred times as long.
    """
    shape = quantize.outputs[0].shape
    steps = [('Div', 'scale', scale)] + ([] if zero is None else [('Add', 'shift', zero.astype(np.float32))])
    for op_type, label, factor in steps:
        factor = by_channel(graph, quantize, f'{quantize.name}_{label}', factor, shape)
        name = f'{quantize.name}_{op_type.lower()}'
        quantize.replace_input_with(0, add_node(quantize, op_type, [quantize.inputs[0], factor], name))


def _scale_weight(graph: ir.Graph, reader: ir.Node, factor: np.ndarray) -> ir.Node:
    """Multiplies the weight's scales for one call of a layer; other calls keep theirs.

    Returns:
        DequantizeLinear of this call's weight.
    """
    weight = reader.inputs[1].producer()
    if len(weight.outputs[0].uses()) > 1:
        name, axis = f'{reader.name}.own_weight', dict(axis=axis_of(weight))
        value = add_node(reader, 'DequantizeLinear', list(weight.inputs), name, axis, like=weight.outputs[0])
        reader.replace_input_with(1, value)
        weight = value.producer()
    scaled = (constant(weight.inputs[1]) * factor).astype(np.float32)
    weight.replace_input_with(1, add_constant(graph, f'{reader.name}.weight_scale', scaled))
    return weight


def _per_tensor(node: ir.Node, scale: ir.Value, zero: ir.Value) -> None:
    node.replace_input_with(1, scale)
    node.replace_input_with(2, zero)
    node.attributes.pop('axis')


def divide_before_quantizing(graph: ir.Graph) -> None:
    """Takes scales per channel that are left out of QuantizeLinear: what it reads is divided by them before, in float.

    Changes nothing of what is computed. Comes after :func:`absorb_channel_scales`, which leaves one scale per tensor in
    every DequantizeLinear of an activation.

    Args:
        graph: Changed in place.
    """
    for node in list(graph):
        scale = constant(node.inputs[1]) if node.op_type == 'QuantizeLinear' else None
        if scale is None or scale.ndim != 1:
            continue
        shape = (-1, *[1] * (len(node.outputs[0].shape) - 2))
        scales = add_constant(graph, f'{node.name}_scales', scale.reshape(shape))
        for place, value in enumerate(
            (
                add_node(node, 'Div', [node.inputs[0], scales], f'{node.name}_divided', dtype=None),
                add_constant(graph, f'{node.name}_one', np.float32(1)),
                add_constant(graph, f'{node.name}_zero_point', np.int8(0)),
            )
        ):
            node.replace_input_with(place, value)
        node.attributes.pop('axis', None)
