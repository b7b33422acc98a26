"""What a choice of formats costs, and the budget it must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mmdet_ptq.config import ProtectConfig, PTQConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping import Structure
from mmdet_ptq.wrapping.coverage import FLOAT_BITS, bit_operations, float_size_bytes, operations_outside

RUNTIME_BITS = 8  # more of them no runtime multiplies as integers
# (kind, tensor name) -> spec of its quantizer, None for float; stands in for what the structure says
Specs = Mapping[tuple[str, str], dict | None]


@dataclass(frozen=True)
class Cost:
    """Cost of one detector, or the difference of two.

    Attributes:
        size_bytes: Stored codes and quantization parameters (and what else the checkpoint holds, as far as known).
        bops: Bit operations of one image (multiply-accumulates x weight bits x activation bits, van Baalen et al.,
            Bayesian Bits, NeurIPS 2020).
        float_macs: Multiply-accumulates of layers that do not compute in integers.
    """

    size_bytes: int
    bops: int
    float_macs: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.size_bytes - other.size_bytes, self.bops - other.bops, self.float_macs - other.float_macs)


def cost_of(structure: Structure, changed: Specs | None = None, integer_bits: int = 16) -> Cost:
    """Cost of the layers, with some tensors in other formats.

    Args:
        structure: The structure of the quantized detector.
        changed: Formats that replace the structure's. Defaults to none.
        integer_bits: Inputs of more bits count as float. Defaults to 16.
    """
    changed = changed or {}
    size = bops = float_macs = 0
    for layer in structure.layers:
        weight = changed.get(('weight', layer.name), layer.weight)
        inputs = [
            changed.get(('activation', name), structure.activations[name].spec) if name else None
            for name in layer.inputs
        ]
        size += _weight_bytes(layer.numel, weight)
        widest = max((spec['bits'] if spec else FLOAT_BITS for spec in inputs), default=FLOAT_BITS)
        bops += bit_operations(layer.macs, weight, inputs)
        if weight is None or None in inputs or widest > integer_bits:
            float_macs += layer.macs
    for name, entry in structure.activations.items():
        spec = changed.get(('activation', name), entry.spec)
        size += 2 * FLOAT_BITS // 8 * (spec['num_channels'] or 1) if spec else 0
        # the factors that weights took over
        size += FLOAT_BITS // 8 * entry.divided['channels'] if spec and entry.divided else 0
    uncovered = sum(operation['macs'] for operation in structure.uncovered)
    return Cost(size, bops + operations_outside(structure), float_macs + uncovered)


def _weight_bytes(numel: int, spec: dict | None) -> int:
    """Codes, one number per channel (two with a zero point or a location), and the log-affine table."""
    if spec is None:
        return numel * FLOAT_BITS // 8
    numbers = 1 if spec.get('symmetric') or spec.get('location') == 'zero' else 2
    table = 2 ** spec['bits'] + FLOAT_BITS // 8 * (spec['num_channels'] or 1) if 'mode' in spec else 0
    return -(-numel * spec['bits'] // 8) + numbers * FLOAT_BITS // 8 * (spec['num_channels'] or 1) + table


class Budget:
    """The limits a user named.

    Args:
        block: The ``ptq`` block. Where it exports, 16 bits count as float, as runtimes compute them.
        detector: The quantized detector, for what its checkpoint holds besides quantized tensors.
        structure: Its structure before any change: shares are shares of its float form.
        stored_bytes: Size of the integer checkpoint as it would be written now. Defaults to None, an estimate from
            the tensors it holds.
    """

    def __init__(
        self, block: PTQConfig, detector: nn.Module, structure: Structure, stored_bytes: int | None = None
    ) -> None:
        cfg = block.protect or ProtectConfig()
        self.integer_bits = RUNTIME_BITS if block.export else 16
        outside = (*structure.products, *structure.uncovered)
        macs = sum(layer.macs for layer in structure.layers) + sum(op['macs'] for op in outside)
        self.start = self.cost(structure)
        self.float_size = float_size_bytes(detector)
        self.float_bops = FLOAT_BITS**2 * macs
        weights = FLOAT_BITS // 8 * sum(layer.numel for layer in structure.layers)
        # biases, normalisations and the like: what changes of format leave as it is
        self.rest = self.float_size - weights if stored_bytes is None else stored_bytes - self.start.size_bytes
        self.limits: dict[str, tuple[str, float]] = {}
        if cfg.size_bytes is not None:
            self.limits['size_bytes'] = 'size_bytes', cfg.size_bytes
        if cfg.size_ratio is not None:
            self.limits['size_ratio'] = 'size_bytes', cfg.size_ratio * self.float_size
        if cfg.bops_ratio is not None:
            self.limits['bops_ratio'] = 'bops', cfg.bops_ratio * self.float_bops
        # what is float already is the policy's or an obstacle's doing
        self.limits['max_float_macs'] = 'float_macs', cfg.max_float_macs * macs + self.start.float_macs

    @property
    def size_limit(self) -> float | None:
        """Largest size of the integer checkpoint, in bytes; None without a limit."""
        return min((limit for kind, limit in self.limits.values() if kind == 'size_bytes'), default=None)

    def cost(self, structure: Structure, changed: Specs | None = None) -> Cost:
        """Cost of the layers, with some tensors in other formats, as :func:`cost_of` counts it."""
        return cost_of(structure, changed, self.integer_bits)

    def allows_float(self, cost: Cost) -> bool:
        """Whether a cost keeps the share of floating point."""
        return 'max_float_macs' not in self.exceeded(cost)

    def exceeded(self, cost: Cost) -> list[str]:
        """Keys of the limits that a cost (of :func:`cost_of`) breaks."""
        return [key for key, (kind, limit) in self.limits.items() if self._total(cost, kind) > limit]

    def price(self, change: Cost) -> float:
        """One figure for a change of cost: its shares of the float detector's size and bit operations, added."""
        return change.size_bytes / self.float_size + change.bops / max(self.float_bops, 1)

    def saving(self, keys: list[str], now: Cost, then: Cost) -> float:
        """How much nearer a change comes to some limits, as shares of them."""
        kinds = [self.limits[key] for key in keys]
        return sum((self._total(now, kind) - self._total(then, kind)) / max(limit, 1) for kind, limit in kinds)

    def size_bytes(self, cost: Cost) -> int:
        """Size of the integer checkpoint."""
        return cost.size_bytes + self.rest

    def refuse(self, least: Cost) -> None:
        """Raises unless a cost, the least that can be reached, keeps every limit.

        Raises:
            PTQError: With the key and the least value that can be reached.
        """
        for key in self.exceeded(least):
            kind, limit = self.limits[key]
            value = self._total(least, kind)
            whole = dict(size_ratio=self.float_size, bops_ratio=self.float_bops).get(key, 1)
            # rounded up, so that the value told is one that can be kept
            told = f'{value}' if whole == 1 else f'{-(-value * 10000 // whole) / 10000:.4f}'
            asked = f'{limit:.0f}' if whole == 1 else f'{limit / whole:.4f}'
            raise PTQError(
                f'the budget `ptq.protect.{key}` = {asked} cannot be kept: the least that can be reached is '
                f'{told}; raise it to that or more.'
            )

    def _total(self, cost: Cost, kind: str) -> int:
        return self.size_bytes(cost) if kind == 'size_bytes' else getattr(cost, kind)
