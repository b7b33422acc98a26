"""Changes of an exported graph that no runtime makes by itself; none changes what is computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmdet_ptq.deploy.integers.kernels import ON_GRID, SLACK
from mmdet_ptq.deploy.onnx.graph import (
    add_behind,
    add_constant,
    add_node,
    axis_of,
    constant,
    layers,
    only_consumer,
    produced_by,
)

_INT32 = 2**31 - 1


def drop_redundant_clips(graph: ir.Graph) -> int:
    """Removes ReLU and clips whose bounds lie at or outside the codes of the quantizer that follows.

    Returns:
        How many were removed.
    """
    removed = 0
    for node in list(graph):
        if node.op_type not in ('Relu', 'Clip') or node.outputs[0].is_graph_output():
            continue
        bounds = _clip_bounds(node)
        consumers = node.outputs[0].consumers()
        if bounds is None or not consumers or not all(_saturates(reader, *bounds) for reader in consumers):
            continue
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        graph.remove(node, safe=True)
        removed += 1
    return removed


def _clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    if node.op_type == 'Relu':
        return 0.0, np.inf
    low, high = (constant(v) for v in (list(node.inputs) + [None, None])[1:3])
    if node.inputs[0].dtype not in (None, ir.DataType.FLOAT) or low is None or high is None:
        return None
    return float(low.max()), float(high.min())


def _saturates(reader: ir.Node, low: float, high: float) -> bool:
    """Whether a quantizer maps everything below ``low`` to its lowest code, and above ``high`` to its highest."""
    if reader.op_type != 'QuantizeLinear':
        return False
    scale, zero = constant(reader.inputs[1]).astype(np.float64), constant(reader.inputs[2])
    info = np.iinfo(zero.dtype)
    lowest, highest = info.min, info.max
    clip = only_consumer(reader.outputs[0])
    if clip is not None and clip.op_type == 'Clip':
        lowest, highest = (int(constant(v)) for v in clip.inputs[1:3])
    zero = zero.astype(np.float64)
    above = np.isinf(high) or bool((high / scale + zero >= highest - SLACK).all())
    return bool((low / scale + zero <= lowest + SLACK).all()) and above


def clip_codes(graph: ir.Graph) -> int:
    """Clips codes behind a quantizer instead of values in front of it: Q(max(x, a)) = max(Q(x), Q(a)).

    Signed codes do not end where a ReLU does. ONNX Runtime computes a convolution in integers only if nothing stands
    between it and its quantizer.

    Args:
        graph: Changed in place.

    Returns:
        How many ReLUs and clips were moved.
    """
    moved = 0
    for node in list(graph):
        bounds = _clip_bounds(node) if node.op_type in ('Relu', 'Clip') else None
        quantize = only_consumer(node.outputs[0]) if bounds is not None else None
        if quantize is None or quantize.op_type != 'QuantizeLinear' or node.outputs[0].is_graph_output():
            continue
        ends = _codes_of(quantize, bounds)
        if ends is None:
            continue
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        graph.remove(node, safe=True)
        _clip_behind(graph, quantize, ends)
        moved += 1
    return moved


def _codes_of(quantize: ir.Node, bounds: tuple[float, float]) -> np.ndarray | None:
    """What a quantizer makes of two values; None where channels do not agree, or where no kernel clips its codes."""
    scale, zero = (constant(value) for value in quantize.inputs[1:3])
    info = np.iinfo(zero.dtype)
    if info.bits > 8:
        return None
    with np.errstate(over='ignore'):
        steps = [np.rint(np.float32(bound) / scale) + zero.astype(np.float32) for bound in bounds]
    codes = [np.unique(np.clip(step, info.min, info.max)) for step in steps]
    return None if any(len(code) > 1 for code in codes) else np.concatenate(codes).astype(zero.dtype)


def _clip_behind(graph: ir.Graph, quantize: ir.Node, ends: np.ndarray) -> None:
    out = quantize.outputs[0]
    clip = only_consumer(out)
    if clip is None or clip.op_type != 'Clip':
        clip = add_behind(out, 'Clip', [None, None], f'{quantize.name}_clipped')
    else:
        ends = np.clip(ends, *(constant(value) for value in clip.inputs[1:3]))
    for place, code in enumerate(ends, 1):
        clip.replace_input_with(place, add_constant(graph, f'{clip.name}_{place}', np.array(code)))


def keep_float(graph: ir.Graph) -> int:
    """Separates layers whose weight is float from the quantizers around them: ONNX Runtime would quantize the weight.

    Its optimizer rounds float weights between a DequantizeLinear and a QuantizeLinear to 8 bits, whatever they were
    left float for. A maximum with the least float changes nothing and stops it.

    Args:
        graph: Changed in place.

    Returns:
        How many layers were separated.
    """
    separated = 0
    for layer in layers(graph):
        out = layer.node.outputs[0]
        if layer.source is None or constant(layer.node.inputs[1]) is None or out.is_graph_output():
            continue
        least = add_constant(graph, f'{layer.node.name}.least', np.array(np.finfo(np.float32).min))
        add_behind(out, 'Max', [least], f'{layer.node.name}.kept')
        separated += 1
    return separated


def integer_products(graph: ir.Graph) -> int:
    """Writes matrix products of tensors as ONNX Runtime computes them in integers; none becomes another one.

    Three things stand in the way of a linear layer that reads more than rows: a Transpose behind its weight's
    DequantizeLinear, a zero point that is not said, and a flat bias, with which the product becomes a Gemm between
    two Reshapes, in float.

    Args:
        graph: Changed in place.

    Returns:
        How many products there are.
    """
    weights: dict[ir.Value, ir.Value] = {}
    found = 0
    for node in list(graph):
        if node.op_type != 'MatMul' or produced_by(node.inputs[0], 'DequantizeLinear') is None:
            continue
        transpose = produced_by(node.inputs[1], 'Transpose')
        weight = produced_by(transpose.inputs[0] if transpose else node.inputs[1], 'DequantizeLinear')
        codes = None if weight is None else constant(weight.inputs[0])
        if codes is None or codes.dtype != np.int8 or codes.ndim != 2:
            continue
        if transpose is not None:
            if node.inputs[1] not in weights:
                weights[node.inputs[1]] = _transposed(graph, transpose, weight, codes)
            node.replace_input_with(1, weights[node.inputs[1]])
        add = only_consumer(node.outputs[0])
        bias = (
            add is not None and add.op_type == 'Add' and next((v for v in add.inputs if v is not node.outputs[0]), None)
        )
        array = constant(bias) if bias else None
        if array is not None and array.ndim == 1 and node.inputs[0].shape is not None:
            wide = array.reshape((1,) * (len(node.inputs[0].shape) - 1) + (-1,))
            add.replace_input_with(list(add.inputs).index(bias), add_constant(graph, f'{node.name}.bias_wide', wide))
        found += 1
    return found


def _transposed(graph: ir.Graph, transpose: ir.Node, weight: ir.Node, codes: np.ndarray) -> ir.Value:
    """What a Transpose makes of a dequantized weight, dequantized from transposed codes."""
    name, scale = f'{weight.outputs[0].name}_transposed', constant(weight.inputs[1])
    axis = axis_of(weight, 1)
    stored = add_constant(graph, f'{name}_codes', np.ascontiguousarray(codes.T))
    axes = dict(axis=1 - axis) if scale.ndim else {}
    inputs = [stored, *weight.inputs[1:]]
    return add_node(transpose, 'DequantizeLinear', inputs, name, axes, like=transpose.outputs[0])


def weight_zero_points(graph: ir.Graph) -> int:
    """Writes zero points of the weights of matrix products: without them ONNX Runtime leaves some in float.

    Args:
        graph: Changed in place.

    Returns:
        How many layers have one now.
    """
    found = [layer for layer in layers(graph) if layer.integer and layer.node.op_type in ('Gemm', 'MatMul')]
    for layer in found:
        scale = constant(layer.weight.inputs[1])
        if len(layer.weight.inputs) > 2 or scale is None:
            continue
        zero = add_constant(graph, f'{layer.node.name}.weight_zero_point', np.zeros(scale.shape, np.int8))
        layer.weight.resize_inputs(3)
        layer.weight.replace_input_with(2, zero)
    return len(found)


def integer_biases(graph: ir.Graph, stored: bool = True) -> list[str]:
    """Rounds biases to int32, in units of input scale x weight scale, as integer kernels add them.

    Args:
        graph: Changed in place.
        stored: Whether they are stored as int32; otherwise as the float values they stand for, for runtimes that take
            biases in float only. Defaults to True.

    Returns:
        Names of layers whose bias does not fit.
    """
    left = []
    for layer in layers(graph):
        if not layer.integer or layer.bias is None or layer.node.op_type not in ('Conv', 'Gemm'):
            continue
        bias, scale = constant(layer.bias), constant(layer.source.inputs[1])
        if bias is None or scale.ndim:
            continue
        step = (constant(layer.weight.inputs[1]) * scale).astype(np.float32)
        exact = bias.astype(np.float64) / step
        codes = np.rint(exact)
        # matrix products that are called several times add their bias in float
        off_grid = layer.node.op_type == 'Gemm' and np.abs(exact - codes).max(initial=0) > ON_GRID * np.abs(codes).max()
        if np.abs(codes).max(initial=0) > _INT32 or off_grid:
            left.append(layer.node.name)
            continue
        if not stored:
            rounded = (codes * step).astype(np.float32)
            if (rounded != bias).any():
                layer.node.replace_input_with(2, add_constant(graph, f'{layer.node.name}.bias_rounded', rounded))
            continue
        inputs = [
            add_constant(graph, f'{layer.node.name}.bias_codes', codes.astype(np.int32)),
            add_constant(graph, f'{layer.node.name}.bias_scale', step),
        ]
        name = f'{layer.node.name}.bias'
        value = add_node(layer.node, 'DequantizeLinear', inputs, name, dict(axis=0), dtype=None)
        value.name = f'{name}_value'
        layer.node.replace_input_with(2, value)
    return left


# operations whose results are some of their inputs' values
MOVEMENTS = (
    'Concat',
    'MaxPool',
    'Resize',
    'Transpose',
    'Reshape',
    'Slice',
    'Split',
    'Flatten',
    'Squeeze',
    'Unsqueeze',
    'DepthToSpace',
    'SpaceToDepth',
)


def quantize_movements(graph: ir.Graph) -> None:
    """Puts a quantize / dequantize pair behind operations that only move values: runtimes move the codes then.

    The values lie on the quantizer's grid already, so that the pair changes nothing.

    Args:
        graph: Changed in place.
    """
    for node in list(graph):
        if node.op_type not in MOVEMENTS or (node.op_type == 'Resize' and not _nearest(node)):
            continue
        data = node.inputs if node.op_type == 'Concat' else node.inputs[:1]
        sources = [produced_by(value, 'DequantizeLinear') for value in data]
        if None in sources or len({_pair_key(source) for source in sources}) > 1 or axis_of(sources[0]) is not None:
            continue
        for number, out in enumerate(node.outputs):
            if all(reader.op_type == 'QuantizeLinear' for reader in out.consumers()) or out.is_graph_output():
                continue
            pair, name = sources[0].inputs[1:], f'{node.name}_moved_{number}'
            codes = add_behind(out, 'QuantizeLinear', pair, f'{name}_quantize').outputs[0]
            values = add_behind(codes, 'DequantizeLinear', pair, f'{name}_dequantize').outputs[0]
            codes.type, values.type = ir.TensorType(pair[1].dtype), ir.TensorType(ir.DataType.FLOAT)


def _nearest(node: ir.Node) -> bool:
    return 'mode' not in node.attributes or node.attributes['mode'].as_string() == 'nearest'


def _pair_key(dequantize: ir.Node) -> tuple:
    return tuple((constant(value).dtype.str, constant(value).tobytes()) for value in dequantize.inputs[1:])
