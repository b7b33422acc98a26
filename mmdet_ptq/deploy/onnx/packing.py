"""Numbers of an exported graph in as few bits as hold them; a runtime widens them when a session starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mmdet_ptq.deploy.onnx.graph import add_constant, add_node, constant, layers, produced_by

_LEVELS = 16  # that 4 bits tell apart


def pack_weights(graph: ir.Graph) -> int:
    """Stores weights of at most 16 levels as 4-bit codes and a table; runtimes look them up when a session starts.

    Returns:
        How many weights were packed.
    """
    packed: dict[ir.Value, ir.Value] = {}
    for layer in layers(graph):
        if layer.weight is None:
            continue
        stored = layer.weight.inputs[0]
        array = constant(stored)
        if array is None or array.dtype != np.int8:
            continue
        if stored not in packed:
            codes = _codes(array)
            if codes is not None:
                packed[stored] = _value(graph, stored.name, codes)
        if stored in packed:
            layer.weight.replace_input_with(0, packed[stored])
    return len(packed)


@dataclass
class _Codes:
    """A weight of few levels.

    Attributes:
        codes: Up to 4 bits each.
        levels: What they stand for, of the whole layer (L,) or per channel (C, 16); None where they are consecutive.
        lowest: Each channel's lowest level, (C,), to which its codes are added; None with ``levels``.
    """

    codes: np.ndarray
    levels: np.ndarray | None = None
    lowest: np.ndarray | None = None


def _codes(array: np.ndarray) -> _Codes | None:
    """Codes of up to 4 bits and what they stand for; None where there are more levels, or nothing is saved."""
    levels, codes = np.unique(array, return_inverse=True)
    if len(levels) <= _LEVELS:
        return _Codes(codes.reshape(array.shape), levels)
    rows = array.reshape(len(array), -1)
    lowest = rows.min(1)
    # uniform, with a zero point per channel
    if (rows.max(1).astype(np.int32) - lowest < _LEVELS).all() and rows.shape[1] > 2:
        return _Codes((rows.astype(np.int32) - lowest[:, None]).reshape(array.shape), lowest=lowest)
    found = [np.unique(row, return_inverse=True) for row in rows]
    # a table for each channel must not outweigh the codes it saves
    if max(len(row) for row, _ in found) > _LEVELS or rows.shape[1] <= 2 * _LEVELS:
        return None
    levels = np.stack([np.pad(row, (0, _LEVELS - len(row)), mode='edge') for row, _ in found])
    return _Codes(np.stack([codes.reshape(-1) for _, codes in found]).reshape(array.shape), levels)


def _value(graph: ir.Graph, name: str, found: _Codes) -> ir.Value:
    """The weight's integers, computed from nothing but constants, so that a runtime does it once."""
    int32, int8 = dict(to=ir.DataType.INT32), dict(to=ir.DataType.INT8)
    # they read constants alone; behind the first reader other readers might come too early
    first = graph[0]

    def add(op_type: str, inputs: list[ir.Value], label: str, attributes: dict | None = None) -> ir.Value:
        value = add_node(first, op_type, inputs, f'{name}_{label}', attributes, dtype=None)
        value.name += '_value'
        return value

    stored = add_constant(graph, f'{name}_codes', found.codes.astype(np.uint8), ir.DataType.UINT4)
    index = add('Cast', [stored], 'index', int32)
    per_channel = (-1, *[1] * (found.codes.ndim - 1))
    if found.levels is None:
        lowest = add_constant(graph, f'{name}_lowest', found.lowest.reshape(per_channel))
        lowest = add('Cast', [lowest], 'lowest_wide', int32)
        return add('Cast', [add('Add', [index, lowest], 'sum')], 'moved', int8)
    if found.levels.ndim == 2:
        rows = np.arange(len(found.levels), dtype=np.int32).reshape(per_channel) * _LEVELS
        index = add('Add', [index, add_constant(graph, f'{name}_rows', rows)], 'row')
    table = add_constant(graph, f'{name}_levels', found.levels.reshape(-1))
    return add('Gather', [table, index], 'look_up', dict(axis=0))


def _fits_int16(codes: np.ndarray) -> bool:
    info = np.iinfo(np.int16)
    return info.min <= codes.min(initial=0) and codes.max(initial=0) <= info.max


def narrow_biases(graph: ir.Graph) -> int:
    """Stores biases that 16 bits hold as such; runtimes widen them to int32 when a session starts.

    Returns:
        How many were narrowed.
    """
    narrowed: dict[ir.Value, ir.Value] = {}
    for layer in layers(graph):
        dequantize = produced_by(layer.bias, 'DequantizeLinear')
        stored = None if dequantize is None else dequantize.inputs[0]
        codes = constant(stored)
        if codes is None or codes.dtype != np.int32 or not _fits_int16(codes):
            continue
        if stored not in narrowed:
            narrow = add_constant(graph, f'{stored.name}_narrow', codes.astype(np.int16))
            int32 = dict(to=ir.DataType.INT32)
            narrowed[stored] = add_node(graph[0], 'Cast', [narrow], f'{stored.name}_widen', int32, dtype=None)
            narrowed[stored].name = f'{stored.name}_wide'
        dequantize.replace_input_with(0, narrowed[stored])
    return len(narrowed)
