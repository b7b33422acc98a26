"""What a detector costs: bytes, bit operations, and which part of it computes in integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mmdet_ptq.wrapping import LayerStructure, Structure, coverage_rows
from mmdet_ptq.wrapping.coverage import FLOAT_BITS, bit_operations, operations_outside


def float_bops(structure: Structure) -> int:
    """Bit operations of one image when everything is float: multiply-accumulates x 32 x 32.

    Args:
        structure: The structure of the quantized detector.
    """
    return FLOAT_BITS**2 * sum(row.macs for row in coverage_rows(structure))


def bops(structure: Structure) -> int:
    """Bit operations of one image: multiply-accumulates x weight bits x activation bits, over all layers.

    Float tensors count 32 bits, float operations outside layers 32 x 32. A layer that is called several times
    counts the widest of its inputs in every call, so the figure is never too low. The measure is that of van
    Baalen et al., Bayesian Bits (NeurIPS 2020).

    Args:
        structure: The structure of the quantized detector.
    """
    activations = {name: entry.spec for name, entry in structure.activations.items()}
    layers = sum(
        bit_operations(layer.macs, layer.weight, [activations[name] if name else None for name in layer.inputs])
        for layer in structure.layers
    )
    return layers + operations_outside(structure)


def weight_bits(layer: LayerStructure) -> int:
    """Bits of a layer's weight; 32 where it is float."""
    return FLOAT_BITS if layer.weight is None else layer.weight['bits']


@dataclass
class PartSummary:
    """One part of the detector (backbone, neck, bbox_head, ...).

    Attributes:
        part: Name of the detector's child.
        macs: Multiply-accumulates of one image.
        integer_macs: Those on integer weights and integer activations.
        weights: Bits to number of weights, 32 for float ones.
    """

    part: str
    macs: int = 0
    integer_macs: int = 0
    weights: Counter[int] = field(default_factory=Counter)

    @property
    def integer_share(self) -> float:
        """Share of the part's multiply-accumulates that run in integers."""
        return self.integer_macs / self.macs if self.macs else 0.0


def part_summary(structure: Structure) -> list[PartSummary]:
    """Sums cost by part, in the order in which the parts first appear.

    Args:
        structure: The structure of the quantized detector.
    """
    parts: dict[str, PartSummary] = {}
    for row in coverage_rows(structure):
        part = parts.setdefault(row.part, PartSummary(row.part))
        part.macs += row.macs
        part.integer_macs += row.macs if row.integer else 0
    for layer in structure.layers:
        parts[layer.part].weights[weight_bits(layer)] += layer.numel
    return list(parts.values())
