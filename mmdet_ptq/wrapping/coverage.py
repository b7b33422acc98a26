"""What a detector costs, and the coverage table: what computes in integers, what does not, its share of the work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mmdet_ptq.quantizers import build_quantizer
from mmdet_ptq.wrapping.names import product_of
from mmdet_ptq.wrapping.state import STATE
from mmdet_ptq.wrapping.structure import ActivationStructure, Structure

FLOAT_BITS = 32


@dataclass
class CoverageRow:
    """One layer or uncovered operation of the table."""

    name: str
    kind: str
    part: str
    macs: int
    weight: str
    activation: str
    integer: bool
    reason: str


def _format(spec: dict | None) -> str:
    if spec is None:
        return 'float'
    return f'{spec["bits"]}-bit {build_quantizer(spec).style}'


def _input_format(entry: ActivationStructure | None) -> str:
    if entry is None:
        return _format(None)
    per_channel = ' per channel' if entry.spec.get('num_channels') else ''
    return _format(entry.spec) + per_channel + (' (scales migrated)' if entry.divided else '')


def coverage_rows(structure: Structure) -> list[CoverageRow]:
    """One row per layer, then one per product of activations, then one per uncovered operation."""
    rows = []
    for layer in structure.layers:
        entries = [structure.activations[name] if name else None for name in layer.inputs]
        formats = sorted({_input_format(entry) for entry in entries}) or ['float']
        rows.append(
            CoverageRow(
                layer.name,
                layer.kind,
                layer.part,
                layer.macs,
                _format(layer.weight),
                ', '.join(formats),
                layer.integer,
                layer.reason,
            )
        )
    for product in structure.products:
        left, right = (_input_format(structure.activations[name]) for name in product['factors'])
        rows.append(
            CoverageRow(
                product_of(product['factors'][0]),
                'product of activations',
                product['module'].split('.')[0],
                product['macs'],
                right,
                left,
                True,
                '',
            )
        )
    for op in structure.uncovered:
        rows.append(
            CoverageRow(
                op['module'],
                op['operation'],
                op['module'].split('.')[0],
                op['macs'],
                'float',
                'float',
                False,
                op['reason'],
            )
        )
    return rows


def operations_outside(structure: Structure) -> int:
    """Bit operations of what no layer computes: products of activations, and what stays float."""
    found = FLOAT_BITS**2 * sum(operation['macs'] for operation in structure.uncovered)
    for product in structure.products:
        left, right = (structure.activations[name].spec for name in product['factors'])
        found += bit_operations(product['macs'], left, [right])
    return found


def integer_mac_share(structure: Structure) -> float:
    """Share of one image's multiply-accumulates that run on integer weights and integer activations."""
    rows = coverage_rows(structure)
    total = sum(row.macs for row in rows)
    return sum(row.macs for row in rows if row.integer) / total if total else 0.0


def float_size_bytes(detector: nn.Module) -> int:
    """Size of the float detector's parameters and buffers in float32.

    Args:
        detector: The detector; of a quantized one, what quantization added does not count.

    Returns:
        Bytes: four per element of every floating-point parameter and persistent buffer, each tensor counted
            once.
        Counters such as ``num_batches_tracked`` are no part of inference and are left out.
    """
    elements = {
        id(tensor): tensor.numel()
        for name, tensor in detector.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and not name.startswith(f'{STATE}.') and '.0.quantizer.' not in name
    }
    return FLOAT_BITS // 8 * sum(elements.values())


def bit_operations(macs: int, weight: dict | None, inputs: Iterable[dict | None]) -> int:
    """Bit operations of a layer: multiply-accumulates x weight bits x activation bits.

    The measure of van Baalen et al., Bayesian Bits (NeurIPS 2020). A layer that is called several times counts the
    widest of its inputs in every call, so the figure is never too low.

    Args:
        macs: Multiply-accumulates.
        weight: Spec of the weight's quantizer; None for float, which counts 32 bits.
        inputs: The same of the input of each call.
    """
    widest = max((spec['bits'] if spec else FLOAT_BITS for spec in inputs), default=FLOAT_BITS)
    return macs * (weight['bits'] if weight else FLOAT_BITS) * widest
