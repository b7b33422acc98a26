"""The coverage table: what computes in integers, what does not, and its share of the multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass

from mmdet_ptq.quantizers.selection import build_quantizer
from mmdet_ptq.wrapping.structure import Structure


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


def _input_format(entry: dict) -> str:
    spec = entry.get('spec')
    per_channel = ' per channel' if spec and spec.get('num_channels') else ''
    return _format(spec) + per_channel + (' (scales migrated)' if 'divided' in entry else '')


def coverage_rows(structure: Structure) -> list[CoverageRow]:
    """One row per layer, then one per uncovered operation."""
    rows = []
    for layer in structure.layers:
        entries = [structure.activations[name] if name else {} for name in layer.inputs]
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


def integer_mac_share(structure: Structure) -> float:
    """Share of one image's multiply-accumulates that run on integer weights and integer activations."""
    rows = coverage_rows(structure)
    total = sum(row.macs for row in rows)
    return sum(row.macs for row in rows if row.integer) / total if total else 0.0
