"""Strided slices of an image in front of a convolution (the Focus layer of YOLOX), as runtimes compute them fast."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from mmdet_ptq.deploy.onnx.graph import add_constant, add_node, axis_of, constant, only_consumer, produced_by
from mmdet_ptq.deploy.onnx.nodes import CODES

# what a quantizer may consist of, between the concatenated slices and the convolution; all are per tensor
_QUANTIZER = ('Max', 'Min', 'QuantizeLinear', 'Clip', 'DequantizeLinear')


class Folded(NamedTuple):
    """A convolution that reads the image itself.

    Attributes:
        layer: Its name.
        activation: Name of its quantized input, without ``:codes``; None where the input is float.
        offsets: Row and column at which each slice of the image began, in the order of their channels.
    """

    layer: str
    activation: str | None
    offsets: list[tuple[int, int]]


class _Slices(NamedTuple):
    """An image cut into every r-th pixel of every r-th row."""

    image: ir.Value
    concat: ir.Node
    offsets: list[tuple[int, int]]

    @property
    def step(self) -> int:
        return round(len(self.offsets) ** 0.5)


def fold_space_to_depth(graph: ir.Graph, into_kernel: bool) -> list[Folded]:
    """Replaces strided slices and their concatenation, which read memory in leaps.

    Args:
        graph: Changed in place, after :func:`mmdet_ptq.deploy.onnx.nodes.expand_quantizers`. What does not fit stays as
            it is.
        into_kernel: Whether the convolution reads the image itself. One of r x r slices with kernel k, stride s and
            padding p is one of the image with r k, r s and r p::

                W'[:, c, r ky + dy, r kx + dx] = W[:, j C + c, ky, kx]  where slice j begins at (dy, dx)

            It has the same products and the same zeros around the image; a quantizer between the concatenation and the
            convolution, per tensor, moves onto the image. OpenVINO computes this fastest. Otherwise the operation
            SpaceToDepth takes the place of the slices, and the weight's input channels are put in its order, which is
            faster in ONNX Runtime.

    Returns:
        The changed convolutions.
    """
    folded = []
    for node in list(graph):
        slices = _slices(node) if node.op_type == 'Concat' else None
        quantizer, convolution = _path(node) if slices is not None else ([], None)
        if convolution is None or not _fits(convolution, slices):
            continue
        if into_kernel:
            _change_weight(graph, convolution, _folded(_stored_array(convolution), slices))
            _fold_window(convolution, slices.step)
            _read_image(quantizer, convolution, slices)
        else:
            _change_weight(graph, convolution, _reordered(_stored_array(convolution), slices))
            _space_to_depth(slices)
        _remove_unread(graph, slices)
        codes = [inner.outputs[0].name for inner in quantizer if inner.op_type == 'QuantizeLinear']
        folded.append(Folded(convolution.name, codes[0].removesuffix(CODES) if codes else None, slices.offsets))
    return folded


def _slices(concat: ir.Node) -> _Slices | None:
    """What a concatenation takes from one image, if that is every pixel of it once, by strided slices."""
    step = round(len(concat.inputs) ** 0.5)
    chains = [_chain(value) for value in concat.inputs]
    # the image is the last value that all slices have in common
    image = next((value for value in chains[0] if all(value in chain for chain in chains)), None)
    if (
        step < 2
        or step * step != len(chains)
        or axis_of(concat) not in (1, -3)
        or image is None
        or image.shape is None
        or len(image.shape) != 4
        or not all(isinstance(n, int) for n in image.shape[1:])
    ):
        return None
    size = image.shape[2:]
    kept = [_kept(chain[: chain.index(image)], size) for chain in chains]
    offsets = [(rows.start, columns.start) for rows, columns in kept]
    wanted = [tuple(range(n)[offset::step] for n, offset in zip(size, place, strict=True)) for place in offsets]
    every = sorted((dy, dx) for dy in range(step) for dx in range(step))
    if any(n % step for n in size) or kept != wanted or sorted(offsets) != every:
        return None
    return _Slices(image, concat, offsets)


def _chain(value: ir.Value) -> list[ir.Value]:
    """A value and what it was sliced from, step by step."""
    chain = [value]
    while (node := produced_by(chain[-1], 'Slice')) is not None and _ranges(node) is not None:
        chain.append(node.inputs[0])
    return chain


def _kept(chain: list[ir.Value], size: tuple[int, int]) -> tuple[range, range]:
    """The rows and columns of an image that a chain of slices leaves."""
    kept = {2: range(size[0]), 3: range(size[1])}
    for value in reversed(chain):
        for axis, part in _ranges(value.producer()):
            kept[axis] = kept[axis][part]
    return kept[2], kept[3]


def _ranges(node: ir.Node) -> list[tuple[int, slice]] | None:
    """What a Slice keeps of rows (axis 2) and columns (axis 3); None if it is not known, backwards or elsewhere."""
    values = (list(node.inputs) + [None, None])[1:5]
    starts, ends, axes, steps = (constant(value) for value in values)
    if (
        starts is None
        or ends is None
        or any(value is not None and array is None for value, array in zip(values[2:], (axes, steps), strict=True))
    ):
        return None
    axes = np.arange(len(starts)) if axes is None else axes % 4
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    if (steps < 1).any() or not set(axes.tolist()) <= {2, 3}:
        return None
    return [(int(axis), slice(*map(int, part))) for axis, *part in zip(axes, starts, ends, steps, strict=True)]


def _path(concat: ir.Node) -> tuple[list[ir.Node], ir.Node | None]:
    """The quantizer, perhaps of no nodes, and the convolution that alone reads what a concatenation gives."""
    nodes, reader = [], only_consumer(concat.outputs[0])
    while reader is not None and reader.op_type in _QUANTIZER:
        if any(constant(value) is None or constant(value).size != 1 for value in reader.inputs[1:]):
            return [], None
        nodes.append(reader)
        reader = only_consumer(reader.outputs[0])
    return nodes, reader if reader is not None and reader.op_type == 'Conv' else None


def _fits(convolution: ir.Node, slices: _Slices) -> bool:
    attributes, stored = convolution.attributes, _stored_weight(convolution)
    return (
        stored is not None
        and len(stored.shape) == 4
        and stored.shape[1] == len(slices.offsets) * slices.image.shape[1]
        and ('group' not in attributes or attributes['group'].as_int() == 1)
        and ('dilations' not in attributes or set(attributes['dilations'].as_ints()) == {1})
        and ('auto_pad' not in attributes or attributes['auto_pad'].as_string() == 'NOTSET')
    )


def _stored_weight(convolution: ir.Node) -> ir.Value | None:
    """The constant that holds a weight: its integers, of which each output channel has a scale, or its values."""
    dequantize = produced_by(convolution.inputs[1], 'DequantizeLinear')
    if dequantize is None:
        return convolution.inputs[1] if constant(convolution.inputs[1]) is not None else None
    scale, stored = constant(dequantize.inputs[1]), constant(dequantize.inputs[0])
    if (
        scale is None
        or stored is None
        or 'block_size' in dequantize.attributes
        or (scale.ndim and axis_of(dequantize, 1) not in (0, -stored.ndim))
    ):
        return None
    return dequantize.inputs[0]


def _stored_array(convolution: ir.Node) -> np.ndarray:
    return constant(_stored_weight(convolution))


def _folded(array: np.ndarray, slices: _Slices) -> np.ndarray:
    """A weight of slices as one of the image."""
    step, (outputs, channels, *kernel) = slices.step, array.shape
    channels //= len(slices.offsets)
    weight = np.empty((outputs, channels, *(step * n for n in kernel)), array.dtype)
    for place, (dy, dx) in enumerate(slices.offsets):
        weight[:, :, dy::step, dx::step] = array[:, place * channels : (place + 1) * channels]
    return weight


def _reordered(array: np.ndarray, slices: _Slices) -> np.ndarray:
    """A weight of slices with its input channels in the order of SpaceToDepth: row by row of offsets."""
    blocks = np.split(array, len(slices.offsets), axis=1)
    return np.concatenate([blocks[slices.offsets.index(place)] for place in sorted(slices.offsets)], axis=1)


def _space_to_depth(slices: _Slices) -> None:
    old = slices.concat.outputs[0]
    step = dict(blocksize=slices.step)
    value = add_node(slices.concat, 'SpaceToDepth', [slices.image], slices.concat.name, step, like=old)
    value.name = f'{old.name}_depth'
    old.replace_all_uses_with(value)


def _change_weight(graph: ir.Graph, convolution: ir.Node, weight: np.ndarray) -> None:
    stored = _stored_weight(convolution)
    dequantize = produced_by(convolution.inputs[1], 'DequantizeLinear')
    # whoever else reads the weight keeps the old one
    last = convolution.inputs[1]
    shared = len(last.uses()) > 1 or len(stored.uses()) > 1
    if shared:
        stored = add_constant(graph, stored.name, weight, stored.dtype)
    else:
        stored.const_value, stored.shape = (
            ir.tensor(weight, dtype=stored.dtype, name=stored.name),
            ir.Shape(weight.shape),
        )
    if dequantize is None:
        convolution.replace_input_with(1, stored)
        return
    if shared:
        inputs, name = [stored, *dequantize.inputs[1:]], f'{convolution.name}.folded_weight'
        last = add_node(convolution, 'DequantizeLinear', inputs, name, dict(dequantize.attributes), like=last)
        convolution.replace_input_with(1, last)
    last.shape = ir.Shape(weight.shape)


def _fold_window(convolution: ir.Node, step: int) -> None:
    attributes = convolution.attributes
    attributes['kernel_shape'] = ir.AttrInt64s('kernel_shape', list(_stored_weight(convolution).shape[2:]))
    for name, default in (('strides', [1, 1]), ('pads', [0, 0, 0, 0])):
        values = attributes[name].as_ints() if name in attributes else default
        attributes[name] = ir.AttrInt64s(name, [step * value for value in values])


def _read_image(quantizer: list[ir.Node], convolution: ir.Node, slices: _Slices) -> None:
    (quantizer or [convolution])[0].replace_input_with(0, slices.image)
    for node in quantizer:
        node.outputs[0].shape = slices.image.shape


def _remove_unread(graph: ir.Graph, slices: _Slices) -> None:
    """Removes what nobody reads any more: later passes count readers."""
    unread = [slices.concat]
    while unread:
        node = unread.pop()
        if node.graph is graph and not any(out.uses() or out.is_graph_output() for out in node.outputs):
            unread += [before for value in node.inputs if (before := produced_by(value, 'Slice')) is not None]
            graph.remove(node, safe=True)
