"""Closed-form reconstruction: each layer of a unit by least squares, its rounding errors compensated."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdet_ptq.calibration.reconstruction.least_squares import (
    LayerEquations,
    NearestLevel,
    NeighbourSums,
    by_group,
    levels_of,
    patches,
    why_astray,
    why_unexplained,
)
from mmdet_ptq.calibration.reconstruction.streams import FLOAT, CallInputs
from mmdet_ptq.calibration.reconstruction.unit_data import UnitData
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import Quantizer
from mmdet_ptq.wrapping import quantization_mode
from mmdet_ptq.wrapping.weights import float_weight

# grids tried around the scale of least error without compensation
SCALE_FACTORS = (1.0, 0.7, 0.8, 0.9, 1.1)
# weights, times grids that are tried at once: small layers take the time of as many operations, large ones memory
MOST_AT_ONCE = 2**22
# damping of the rounding, as a share of that of the least squares: rounding errors are known, not estimated
ROUNDING_SHARE = 0.01


@torch.no_grad()
def solve_unit(data: UnitData) -> None:
    """Solves and rounds one layer after another, each with the layers before it already quantized."""
    float_values = [
        (value, value.detach().clone())
        for layer in data.layers.values()
        for value in (float_weight(layer), layer.bias)
        if value is not None
    ]
    for name, layer in data.layers.items():
        quantizer, weight = data.weights[name].quantizer, float_weight(layer)
        equations, reason = _equations(data, name, float_values)
        if equations is None:
            print_log(f'{name}: {reason}, so its weights are not compensated', 'current', level=logging.WARNING)
            continue
        groups, rows = getattr(layer, 'groups', 1), data.weights[name].layout.to_rows(weight)
        start = rows.view(groups, -1, rows.shape[1])
        bias = layer.bias.view(groups, -1) if layer.bias is not None else start.new_zeros(start.shape[:2])
        try:
            solved, _ = equations.solve(start, bias, data.cfg.damping)
            _check_solution(solved, name)
            quantizer.fit_weight(solved.reshape(rows.shape), importance=_importance(equations, solved, rows.shape))
            rounded = _round_at_best_scale(equations, solved, ROUNDING_SHARE * data.cfg.damping, quantizer)
        except torch.linalg.LinAlgError as error:
            raise _no_solution(name) from error
        _check_solution(rounded, name)
        weight.copy_(data.weights[name].layout.from_rows(rounded.reshape(rows.shape), weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(equations.best_bias(rounded).reshape(-1))


def _no_solution(name: str) -> PTQError:
    return PTQError(f'the least squares of layer {name} have no finite solution; raise `ptq.reconstruct.damping`.')


def _check_solution(weight: Tensor, name: str) -> None:
    if not torch.isfinite(weight).all():
        raise _no_solution(name)


def _importance(equations: LayerEquations, weight: Tensor, shape: torch.Size) -> Tensor | None:
    """What an error of each weight costs, with mean 1; None where all inputs were zero and none costs anything."""
    importance = equations.importance()[:, None].expand_as(weight).reshape(shape)
    mean = importance.mean()
    return importance / mean if mean > 0 else None


def _equations(
    data: UnitData, name: str, float_values: list[tuple[Tensor, Tensor]]
) -> tuple[LayerEquations | None, str]:
    """The normal equations of a layer from the training samples, or why there are none."""
    layer, weight = data.layers[name], data.weights[name]
    if reason := why_astray(weight.quantizer):
        return None, reason
    equations, batches = None, sorted({batch for batch, _ in data.train_samples})
    for call, batch in itertools.product(range(data.unit.calls), batches):
        with quantization_mode(data.streams.detector, FLOAT), _with_values(float_values):
            targets = seen_by(data, name, call, data.float_inputs[call][batch])
            if equations is None:
                (x, output), rows = targets[0], weight.layout.to_rows(float_weight(layer))
                reads = patches(layer, x)
                if reason := why_unexplained(layer, rows, reads, by_group(layer, output)):
                    return None, reason
                groups, fan_in, _ = reads.shape
                equations = LayerEquations(groups, len(rows) // groups, fan_in, layer.bias is not None, rows.device)
        for (_, output), (x, _) in zip(targets, seen_by(data, name, call, data.inputs[call][batch]), strict=True):
            y = by_group(layer, output)
            picked = torch.randperm(y.shape[2], device=y.device)[: data.cfg.max_positions]
            counts = _counts(data, call, batch, picked, len(output), y.shape[2])
            equations.add(patches(layer, x, picked), y[..., picked], counts)
    if not (torch.isfinite(equations.inputs).all() and torch.isfinite(equations.targets).all()):
        return None, 'what it reads or returns holds NaN or infinity'
    return equations, ''


@contextmanager
def _with_values(values: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Puts the float values of a unit's layers back for a while: some of them are solved already."""
    now = [parameter.detach().clone() for parameter, _ in values]
    for parameter, value in values:
        parameter.copy_(value)
    try:
        yield
    finally:
        for (parameter, _), value in zip(values, now, strict=True):
            parameter.copy_(value)


def _counts(data: UnitData, call: int, batch: int, picked: Tensor, rows: int, count: int) -> Tensor | None:
    """How much each picked position counts, (P,); None where all count alike.

    Args:
        data: The unit.
        call: Its call.
        batch: The batch.
        picked: Positions of the layer's output, counted image by image.
        rows: First dimension of the layer's output.
        count: All its positions.
    """
    if data.importance is None or len(data.layers) > 1:
        # positions of a layer inside a block are not those of the block's output
        return None
    positions = data.importance[call][0][batch]
    if len(positions) != rows or positions.numel() != count:
        return None
    return (1 - data.cfg.fisher) + data.cfg.fisher * positions.flatten()[picked]


class Convolved(TorchFunctionMode):
    """Keeps what the last convolution read: layers may pad their input themselves (mmcv's adaptive padding)."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv2d:
            self.read = args[0]
        return func(*args, **(kwargs or {}))

    def read_by(self, layer: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """What a layer read that has just run, and was called with these arguments."""
        return self.read if isinstance(layer, nn.Conv2d) else args[0] if args else kwargs['input']


def seen_by(data: UnitData, name: str, call: int, inputs: CallInputs) -> list[tuple[Tensor, Tensor]]:
    """Inputs, after their quantization, and outputs of a layer in one call of the unit."""
    seen, convolved = [], Convolved()

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.append((convolved.read_by(module, args, kwargs).clone(), output.clone()))

    handle = data.layers[name].register_forward_hook(see, with_kwargs=True)
    try:
        with convolved:
            data.streams.run(data.unit, call, inputs, data.streams.tensors(inputs))
    finally:
        handle.remove()
    return seen


def _round_at_best_scale(equations: LayerEquations, weight: Tensor, damping: float, quantizer: Quantizer) -> Tensor:
    """Tries finer and coarser grids; every output channel keeps the scale with the least error."""
    best, best_error, best_factor, before = weight, None, None, 1.0
    round_on_grid, neighbours = equations.rounding(weight, damping), getattr(quantizer, 'neighbours', None)
    groups, rows, _ = weight.shape
    at_once = max(1, MOST_AT_ONCE // weight.numel())
    for start in range(0, len(SCALE_FACTORS), at_once):
        factors, levels, scales = SCALE_FACTORS[start : start + at_once], [], []
        for factor in factors:
            quantizer.rescale(torch.tensor(factor / before))
            before = factor
            levels.append(levels_of(quantizer, groups * rows).view(groups, rows, -1))
            if neighbours is not None:
                scales.append(quantizer.positive_scale().detach().expand(groups * rows).view(groups, rows))
        sums = NeighbourSums(neighbours, torch.cat(scales, 1)) if scales else None
        found = round_on_grid(NearestLevel(torch.cat(levels, 1).flatten(0, 1)), sums, len(factors))
        for factor, rounded, error in zip(factors, *(part.chunk(len(factors), 1) for part in found), strict=True):
            if best_error is None:
                best, best_error, best_factor = rounded, error, torch.full_like(error, factor)
                continue
            better = error < best_error
            best = torch.where(better[..., None], rounded, best)
            best_error, best_factor = torch.where(better, error, best_error), best_factor.masked_fill(better, factor)
    quantizer.rescale(best_factor.flatten().to(weight.dtype) / before)
    # the same values on the final grid
    return quantizer(best.reshape(best_factor.numel(), -1)).view(best.shape)
