"""Weights rounded so that each error is made up for by the weights that follow: one pass over a few images.

GPTQ (Frantar et al., ICLR 2023) for a whole detector at once. Unlike the closed form it takes no error of earlier
layers back: each layer stays as near as its grid lets it to its own float weights, on what it reads in the quantized
detector. So it needs no units, no targets and no gradients. An output channel changes only if that helps on images that
it was not chosen on.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ptq.calibration.reconstruction.closed_form import Convolved
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
from mmdet_ptq.progress import track
from mmdet_ptq.wrapping import quantization_mode
from mmdet_ptq.wrapping.weights import float_weight, quantized_weights

# images that tell what layers read, and positions of a batch that are taken of each call; of the batches one in four
# judges what the others say
ROUNDING_IMAGES, POSITIONS, JUDGES = 16, 8192, 4
# damping, as a share of the inputs' mean square: a weight that reads next to nothing takes up no error
DAMPING = 1e-2
# weights of an output channel: the time of a layer grows with their square, and more
MOST_WEIGHTS = 4608
# of equations that are summed at once; more go round again
MEMORY = 2**30


class _Layer:
    """A layer on its way: what it read, and why it keeps its codes."""

    def __init__(self, name: str, module: nn.Module, weight: Any) -> None:
        self.name, self.module, self.weight = name, module, weight
        self.original = float_weight(module)
        self.rows = weight.layout.to_rows(self.original.detach())
        groups = getattr(module, 'groups', 1)
        self.shape = (groups, len(self.rows) // groups, self.rows.shape[1])
        # one to choose by, one to judge by; without another batch than the first they are the same
        self.equations: list[LayerEquations] = []
        self.reason = ''
        if self.shape[2] > MOST_WEIGHTS:
            self.reason = f'an output channel has more than {MOST_WEIGHTS} weights'
        else:
            self.reason = why_astray(weight.quantizer)

    @property
    def bytes(self) -> int:
        return 2 * 8 * self.shape[0] * (self.shape[1] + self.shape[2]) * self.shape[2]

    def see(self, read: Tensor, output: Tensor, judges: bool) -> None:
        """Adds what one call read."""
        if not output.numel():  # of no region
            return
        y = by_group(self.module, output)
        picked = torch.randperm(y.shape[2], device=y.device)[:POSITIONS]
        x = patches(self.module, read, picked)
        if not self.equations and not self.reason:
            # what it multiplies by is its quantized weight
            self.reason = why_unexplained(
                self.module, self.weight.layout.to_rows(self.module.weight.detach()), x, y[..., picked]
            )
            if not self.reason:
                sums = (LayerEquations(*self.shape, self.module.bias is not None, x.device) for _ in range(2))
                self.equations = list(sums)
        if not self.reason:
            # of no use here: what the layer is to return follows from its weights
            self.equations[judges].add(x, x.new_zeros(()).expand(self.shape[0], self.shape[1], x.shape[2]))

    def round(self) -> bool:
        """Sets the weight and the bias; whether it could."""
        chosen, judge = self.equations if self.equations[1].count else self.equations[:1] * 2
        quantizer, start = self.weight.quantizer, self.rows.view(self.shape)
        neighbours = getattr(quantizer, 'neighbours', None)
        scale = None if neighbours is None else quantizer.positive_scale().detach().expand(len(self.rows))
        sums = None if scale is None else NeighbourSums(neighbours, scale.view(self.shape[:2]))
        levels = NearestLevel(levels_of(quantizer, len(self.rows)))
        try:
            # sweeps after it take 1.7 times as long as it does, and give 0.1 dB
            rounded, _ = chosen.rounding(start, DAMPING)(levels, sums, sweeps=0)
        except torch.linalg.LinAlgError:
            rounded = torch.full_like(start, torch.nan)
        if not torch.isfinite(rounded).all():
            return False
        bias, nearest = chosen.mean_change(start - rounded), quantizer(self.rows).view(self.shape)
        if self.module.bias is None:
            bias.zero_()
        better = judge.error(rounded - start, bias) < judge.error(nearest - start, torch.zeros_like(bias))
        rounded, bias = torch.where(better[..., None], rounded, start), bias * better
        self.original.copy_(self.weight.layout.from_rows(rounded.reshape(self.rows.shape), self.original.shape))
        if self.module.bias is not None:
            self.module.bias += bias.reshape(-1)
        return True


@torch.no_grad()
def compensate_rounding(detector: nn.Module, batches: Iterable[Any]) -> dict[str, str]:
    """Chooses the codes of every weight of a quantized detector, in place.

    The same on every rank, and in every run.

    Args:
        detector: The quantized detector, its activation ranges set, in eval mode.
        batches: A few calibration batches as a dataloader yields them, each time they are asked for.

    Returns:
        Layers that keep the codes of rounding to the nearest, with why.
    """
    # with 16 bits there is nothing to make up for
    weights = {name: weight for name, weight in quantized_weights(detector).items() if weight.quantizer.bits <= 8}
    if not weights:
        return {}
    layers = [_Layer(name, detector.get_submodule(name), weight) for name, weight in weights.items()]
    owners = Counter(
        id(value) for layer in layers for value in (layer.original, layer.module.bias) if value is not None
    )
    for layer in layers:
        if owners[id(layer.original)] > 1 or owners[id(layer.module.bias)] > 1:
            layer.reason = 'it shares its weight or its bias with another layer'
    for some in _that_fit([layer for layer in layers if not layer.reason]):
        _read(detector, batches, some)
        for layer in some:
            if not layer.equations and not layer.reason:
                layer.reason = 'it does not run'
            elif not layer.reason and not layer.round():
                layer.reason = 'what it reads gives no finite solution'
            layer.equations = []
    kept = {layer.name: layer.reason for layer in layers if layer.reason}
    print_log(f'rounding errors of {len(layers) - len(kept)} of {len(layers)} weights are made up for', 'current')
    for reason in sorted(set(kept.values())):
        names = [name for name, why in kept.items() if why == reason]
        told = ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
        print_log(f'rounded to the nearest, for {reason}: {told}', 'current', logging.WARNING)
    return kept


def _that_fit(layers: Sequence[_Layer]) -> Iterator[list[_Layer]]:
    """Layers whose equations fit in memory together."""
    some: list[_Layer] = []
    for layer in layers:
        if some and sum(other.bytes for other in some) + layer.bytes > MEMORY:
            yield some
            some = []
        some.append(layer)
    if some:
        yield some


def _read(detector: nn.Module, batches: Iterable[Any], layers: Sequence[_Layer]) -> None:
    """Runs the quantized detector while layers look at what they read."""
    convolved, judges = Convolved(), False

    def hook_of(layer: _Layer):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            layer.see(convolved.read_by(module, args, kwargs), output, judges)

        return hook

    # before all others: some round what a layer returns
    handles = [layer.module.register_forward_hook(hook_of(layer), prepend=True, with_kwargs=True) for layer in layers]
    device = next(detector.parameters()).device
    try:
        with torch.random.fork_rng([] if device.type == 'cpu' else [device]), quantization_mode(detector, 'quantize'):
            torch.manual_seed(0)
            for number, batch in enumerate(track(batches, description='rounding weights'), 1):
                judges = number % JUDGES == 0
                data = detector.data_preprocessor(batch, False)
                with convolved:
                    detector(**data, mode='predict')
    finally:
        for handle in handles:
            handle.remove()
