"""What a detector costs: bytes, bit operations, and which part of it computes in integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from mmdet_ptq.wrapping import LayerStructure, Structure, coverage_rows

FLOAT_BITS = 32


def float_size_bytes(detector: nn.Module) -> int:
    """Size of the float detector's parameters and buffers in float32.

    Args:
        detector: The float detector, before wrapping.

    Returns:
        Bytes: four per element of every floating-point parameter and persistent buffer, each tensor counted
            once.
        Counters such as ``num_batches_tracked`` are no part of inference and are left out.
    """
    tensors = detector.state_dict(keep_vars=True).values()
    elements = {id(tensor): tensor.numel() for tensor in tensors if tensor.is_floating_point()}
    return FLOAT_BITS // 8 * sum(elements.values())


def float_bops(structure: Structure) -> int:
    """Bit operations of one image when everything is float: multiply-accumulates x 32 x 32.

    Args:
        structure: The structure of the quantized detector.
    """
    return FLOAT_BITS**2 * sum(row.macs for row in coverage_rows(structure))


def bops(structure: Structure) -> int:
    """Bit operations of one image: multiply-accumulates x weight bits x activation bits, over all layers.

    Float tensors count 32 bits, operations outside layers 32 x 32. A layer that is called several times
    counts the widest of its inputs in every call, so the figure is never too low. The measure is that of van
    Baalen et al., Bayesian Bits (NeurIPS 2020).

    Args:
        structure: The structure of the quantized detector.
    """
    layers = sum(layer.macs * weight_bits(layer) * activation_bits(layer, structure) for layer in structure.layers)
    return layers + FLOAT_BITS**2 * sum(operation['macs'] for operation in structure.uncovered)


def weight_bits(layer: LayerStructure) -> int:
    """Bits of a layer's weight; 32 where it is float."""
    return FLOAT_BITS if layer.weight is None else layer.weight['bits']


def activation_bits(layer: LayerStructure, structure: Structure) -> int:
    """Bits of the widest input of a layer; 32 where any of its inputs is float.

    Args:
        layer: The layer.
        structure: The structure it belongs to, which holds the activation formats.
    """
    bits = [structure.activations[name]['spec']['bits'] if name else FLOAT_BITS for name in layer.inputs]
    return max(bits, default=FLOAT_BITS)


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
