"""Cross-layer equalization: per-channel factors move from one layer's rows to the next's columns.

Weights change, the float detector's outputs do not, and nothing is added to inference.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ptq.wrapping.preparing.junctions import Junction, Skipped
from mmdet_ptq.wrapping.watching.layers import RowLayout, channel_axis, is_depthwise, is_transposed

# a channel that is almost dead must not blow up: what it holds on other images is not known
MAX_FACTOR = 64.0
# logarithm of the largest factor at which the iteration counts as settled
SETTLED = 1e-3


@dataclass(frozen=True)
class Equalized:
    """What was done at one junction.

    Attributes:
        junction: The layers.
        factors: What the producers' rows were divided by, (C,).
    """

    junction: Junction
    factors: Tensor

    def __str__(self) -> str:
        return (
            f'{self.junction}: factors {self.factors.min():.3g} to {self.factors.max():.3g} '
            f'on {int((~self.junction.fixed).sum())} of {len(self.factors)} channels'
        )


@torch.no_grad()
def equalize(
    detector: nn.Module, junctions: Sequence[Junction], magnitudes: Sequence[Tensor] | None = None, iterations: int = 40
) -> list[Equalized]:
    """Rescales the layers around every junction, in place; the float outputs stay what they were.

    Without ``magnitudes`` this is cross-layer equalization (Nagel et al., ICCV 2019, eq. 11): the factor of a channel
    is ``s = sqrt(r1 / r2)``, r1 and r2 the largest absolute weights of the producers' row and of the readers' column,
    as shares of the layers' largest. All junctions take turns until nothing moves; a chain convolution - depthwise -
    convolution so reaches ``r1 = r2 = r3 = cbrt(r1 r2 r3)``.

    With ``magnitudes`` it is as in SmoothQuant ( Xiao et al., ICML 2023, eq. 4, alpha 0.5): r1 is what the
    channel holds on calibration images, and r2 is measured in shares of each row's largest weight, because every row
    has a scale of its own. Where all readers are depthwise the whole of r1 migrates: a factor on a row of its own
    costs no precision.

    Args:
        detector: The float detector with its normalisations folded, before anything is quantized.
        junctions: From :func:`mmdet_ptq.wrapping.preparing.junctions.find_junctions`.
        magnitudes: From :func:`channel_magnitudes`, one (C,) per junction. Defaults to None.
        iterations: Rounds over all junctions, at most. Defaults to 40.

    Returns:
        One entry per junction.
    """
    totals = [torch.ones_like(junction.floor) for junction in junctions]
    for _ in range(iterations):
        moved = 0.0
        for i, junction in enumerate(junctions):
            held = None if magnitudes is None else magnitudes[i].double().cpu() / totals[i]
            wanted = totals[i] * _step(detector, junction, held)
            wanted = wanted.clamp(1 / MAX_FACTOR, MAX_FACTOR).maximum(junction.floor)
            wanted = torch.where(junction.fixed, 1.0, wanted)
            step = wanted / totals[i]
            totals[i] = wanted
            rescale(detector, junction, step)
            moved = max(moved, step.log().abs().max().item())
        if moved < SETTLED:
            break
    return [Equalized(junction, total) for junction, total in zip(junctions, totals, strict=True)]


@torch.no_grad()
def rescale(detector: nn.Module, junction: Junction, factors: Tensor) -> None:
    """Divides the producers' rows and biases by the factors, and multiplies the readers' columns by them.

    Args:
        detector: The float detector.
        junction: The layers.
        factors: Positive, (C,), float64.
    """
    for name in junction.producers:
        layer = detector.get_submodule(name)
        share = factors.to(layer.weight.device)
        layout = RowLayout.of(layer)
        rows = layout.to_rows(layer.weight.double()) / share[:, None]
        layer.weight.copy_(layout.from_rows(rows, layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() / share)
    for name in junction.readers:
        layer = detector.get_submodule(name)
        columns = _columns(layer, layer.weight.double())
        columns *= factors.to(columns.device).reshape(columns.shape[0], 1, columns.shape[2], 1)
        layer.weight.copy_(columns.reshape(layer.weight.shape))


def channel_magnitudes(detector: nn.Module, junctions: Sequence[Junction], run: Callable[[], Any]) -> list[Tensor]:
    """The largest absolute value per channel that the readers of each junction see.

    Args:
        detector: The float detector.
        junctions: From :func:`mmdet_ptq.wrapping.preparing.junctions.find_junctions`.
        run: Calls the detector on calibration images.

    Returns:
        One tensor (C,) per junction.
    """
    found = [torch.zeros_like(junction.floor) for junction in junctions]

    def listen(i: int) -> Callable:
        def hook(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            largest = x.detach().abs().movedim(channel_axis(module), 0).flatten(1).amax(1)
            found[i] = torch.maximum(found[i], largest.double().cpu())

        return hook

    with ExitStack() as stack:
        for i, junction in enumerate(junctions):
            for name in junction.readers:
                handle = detector.get_submodule(name).register_forward_pre_hook(listen(i), with_kwargs=True)
                stack.callback(handle.remove)
        run()
    return found


def log_equalization(equalized: Sequence[Equalized], skipped: Sequence[Skipped]) -> None:
    """Names what was equalized, and what was not with the reason."""
    print_log(f'{len(equalized)} groups of layers are equalized', 'current')
    for entry in equalized:
        print_log(f'equalized {entry}', 'current', level=logging.DEBUG)
    reasons = defaultdict(list)
    for entry in skipped:
        reasons[entry.reason].append(f'{entry.producer} -> {", ".join(entry.readers)}')
    for reason, pairs in reasons.items():
        print_log(f'not equalized ({len(pairs)}), because {reason}: {"; ".join(pairs)}', 'current')


def _step(detector: nn.Module, junction: Junction, held: Tensor | None) -> Tensor:
    """The factors that would balance a junction as its layers are now, 1 where there is nothing to balance."""
    readers = [detector.get_submodule(name) for name in junction.readers]
    if held is None:
        r1 = torch.stack([_row_ranges(detector.get_submodule(name)) for name in junction.producers]).amax(0)
    else:
        r1 = held
    if held is not None and all(is_depthwise(layer) for layer in readers):
        r2, power = torch.ones_like(r1), 1.0
    else:
        r2, power = torch.stack([_column_ranges(layer, relative=held is not None) for layer in readers]).amax(0), 0.5
    alive = (r1 > 0) & (r2 > 0)
    if not alive.any():
        return torch.ones_like(r1)
    return torch.where(alive, (r1 / r1.max() / (r2 / r2.max())).clamp(min=1e-12) ** power, 1.0)


def _row_ranges(layer: nn.Module) -> Tensor:
    return RowLayout.of(layer).to_rows(layer.weight.detach().double().cpu()).abs().amax(1)


def _column_ranges(layer: nn.Module, relative: bool) -> Tensor:
    weight = layer.weight.detach().double().cpu().abs()
    if relative:
        layout = RowLayout.of(layer)
        rows = layout.to_rows(weight)
        weight = layout.from_rows(rows / rows.amax(1, keepdim=True).clamp(min=1e-30), weight.shape)
    return _columns(layer, weight).amax((1, 3)).flatten()


def _columns(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as (groups, outputs, inputs, kernel); for transposed convolutions (groups * inputs, 1, 1, rest)."""
    if is_transposed(layer):
        return weight.reshape(weight.shape[0], 1, 1, -1)
    groups = getattr(layer, 'groups', 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
