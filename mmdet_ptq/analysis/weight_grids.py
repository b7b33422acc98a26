"""Weights next to the values that their format offers, for the layers where that tells most."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_ptq.quantizers import Quantizer
from mmdet_ptq.wrapping import QuantizedWeight, Structure, coverage_rows, float_weight, quantized_weights
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.inputs import divisions_of
from mmdet_ptq.wrapping.preparing.migration import times_factor
from mmdet_ptq.wrapping.state import STATE

# more ticks than this run into each other
MAX_LEVELS = 64


@dataclass
class WeightGrid:
    """One layer's weights, each channel divided by the largest magnitude that its format offers.

    Attributes:
        layer: Path in the detector.
        format: The format in words, as in the coverage table.
        sqnr_db: Signal to quantization noise ratio of the weight, in decibels.
        weights: The float weights, (elements,).
        levels: The values the format offers, ascending; the median over channels where they differ.
        step: Every how many-th value is in ``levels``.
    """

    layer: str
    format: str
    sqnr_db: float
    weights: np.ndarray
    levels: np.ndarray
    step: int


@torch.no_grad()
def weight_grids(
    detector: nn.Module, structure: Structure, count: int = 6, float_detector: nn.Module | None = None
) -> list[WeightGrid]:
    """The most instructive quantized layers: log-affine ones first, then those that lose most.

    Args:
        detector: The quantized detector.
        structure: Its structure.
        count: How many layers at most. Defaults to 6.
        float_detector: The untouched float detector, whose weights are shown. Defaults to None: those behind the
            quantized ones, which are the same until they are rebuilt from their codes.
    """
    before = _float_weights(detector, structure, float_detector)
    formats = {row.name: row.weight for row in coverage_rows(structure)}
    found = {name: q for name, q in quantized_weights(detector).items() if name in formats}
    losses = {name: _sqnr(before[name], detector.get_submodule(name), q) for name, q in found.items()}
    # a layer of a few weights makes no histogram
    large = [name for name in found if before[name].numel() >= 256] or list(found)
    large.sort(key=lambda name: ('log' not in formats[name], losses[name]))
    return [_grid(name, formats[name], losses[name], before[name], found[name]) for name in large[:count]]


def _float_weights(detector: nn.Module, structure: Structure, float_detector: nn.Module | None) -> dict[str, Tensor]:
    """The weights as they were prepared: with the normalisations behind them, and the factors of their inputs."""
    if float_detector is None:
        return {name: float_weight(detector.get_submodule(name)) for name in quantized_weights(detector)}
    prepared = copy.deepcopy(float_detector)
    fold_norms(prepared, [tuple(pair) for pair in structure.folds])
    names = quantized_weights(detector).keys()
    factors = {name: division.factor for name, division in divisions_of(getattr(detector, STATE), names).items()}
    layers = {name: prepared.get_submodule(name) for name in names}
    return {name: times_factor(layer, layer.weight, factors.get(name)) for name, layer in layers.items()}


def _sqnr(before: Tensor, layer: nn.Module, quantized: QuantizedWeight) -> float:
    rows, after = (quantized.layout.to_rows(weight).float() for weight in (before, layer.weight))
    noise = (after.to(rows) - rows).square().sum().item()
    return 10 * math.log10(max(rows.square().sum().item(), 1e-30) / noise) if noise else math.inf


def _grid(name: str, style: str, sqnr_db: float, before: Tensor, quantized: QuantizedWeight) -> WeightGrid:
    rows = quantized.layout.to_rows(before).float()
    levels = _levels(quantized.quantizer, len(rows))
    reach = levels.abs().amax(1, keepdim=True)
    # a channel of nothing but zeros offers nothing but zero
    reach[reach == 0] = 1
    median = (levels / reach).median(0).values
    step = math.ceil(len(median) / MAX_LEVELS)
    codes = 2**quantized.quantizer.bits
    return WeightGrid(
        name,
        style,
        sqnr_db,
        (rows / reach).flatten().cpu().numpy(),
        median[::step].cpu().numpy(),
        step * max(1, codes // len(median)),
    )


def _levels(quantizer: Quantizer, channels: int) -> torch.Tensor:
    """The values of all codes, ascending, (channels, codes); evenly chosen codes above 8 bits."""
    low, high = quantizer.code_range
    codes = torch.arange(low, high + 1, max(1, (high + 1 - low) // 256), dtype=torch.int32)
    rows = 1 if quantizer.num_channels is None else channels
    device = next(quantizer.parameters()).device
    return quantizer.decode(codes.to(device).expand(rows, -1).contiguous()).sort(1).values
