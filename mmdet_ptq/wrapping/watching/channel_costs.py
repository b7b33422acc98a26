"""What one scale for all channels of a tensor costs the detections, against a scale for each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.quantizers import AffineQuantizer, FisherObserver, Observer
from mmdet_ptq.wrapping.watching.tensors import own_copy

BITS = 8
# values of a tensor that are looked at in each image
MAX_SAMPLES = 2**15

Recorded = list[tuple[Any, Tensor]]
# takes a key, a tensor, and how much each of its values matters; None where that cannot be told
Take = Callable[[Any, Tensor, Tensor | None], None]
# runs the float detector on some images, and hands over what the code that runs appends to the list
Weigh = Callable[[Recorded, Take], None]


class _Ends(FisherObserver):
    """Counts what it is told the weights of, and nothing besides."""

    def _take(self, view: Tensor, low: Tensor, high: Tensor) -> None:
        Observer._take(self, view, low, high)


class ChannelCost:
    """One tensor, over all images and calls.

    Args:
        channels: Its channels.

    Attributes:
        low: Smallest value of each channel, at most zero, (C,).
        high: Largest values, at least zero, (C,).
        weight: How much the values of each channel matter, summed up, (C,).
        energy: The same with their squares, (C,).
        elements: Values looked at, whatever was left out.
    """

    def __init__(self, channels: int) -> None:
        self.low, self.high, self.weight, self.energy = torch.zeros(4, channels, dtype=torch.float64)
        self.elements = 0
        self._observer = _Ends(channel_axis=0)

    def see(self, x: Tensor, weight: Tensor | None, axis: int) -> None:
        """Takes in a tensor and how much its values matter, both of any shape with the channels on the axis.

        Where that is not known, errors count relative to the values of their channel.
        """
        self.__dict__.pop('_range', None)
        rows = x.detach().movedim(axis, 0).flatten(1)
        if weight is None:
            power = rows.double().square().mean(1, keepdim=True)
            # within float32, of channels that are all but zero, too
            weights = torch.where(power > 0, 1 / power, 0).clamp_max(1e30).to(rows.dtype).expand(rows.shape)
        else:
            weights = weight.detach().movedim(axis, 0).flatten(1)
        self.low = torch.minimum(self.low, rows.amin(1).double().cpu())
        self.high = torch.maximum(self.high, rows.amax(1).double().cpu())
        self.elements += rows.numel()
        # an odd stride does not fall in step with the even sizes of feature maps
        stride = -(-rows.numel() // MAX_SAMPLES) | 1
        rows, weights = rows[:, ::stride].float(), weights[:, ::stride].float() * stride
        self.weight += weights.sum(1, dtype=torch.float64).cpu()
        self.energy += (weights * rows.square()).sum(1, dtype=torch.float64).cpu()
        self._observer.update(rows)
        self._observer.weigh(rows, weights)

    def together(self) -> float:
        """Expected loss with one scale, up to a factor that all tensors of a detector share."""
        low, high = self._range
        return self._rounding(high - low)

    def apart(self) -> float:
        """The same with a scale for each channel."""
        low, high = self._ranges()
        return self._rounding(high - low)

    def one_zero_point(self) -> float:
        """The same with a scale for each channel and one zero point for all."""
        low, high = self._ranges()
        quantizer = AffineQuantizer(BITS, num_channels=len(low), channel_axis=0, shared_zero_point=True)
        quantizer.set_range(low, high)
        return self._rounding(quantizer.positive_scale().detach().double() * (2**BITS - 1))

    def _ranges(self) -> tuple[Tensor, Tensor]:
        """The channels' ends, none beyond those of the tensor."""
        low, high = self._range
        return self.low.maximum(low).clamp_max(0), self.high.minimum(high).clamp_min(0)

    @cached_property
    def _range(self) -> tuple[Tensor, Tensor]:
        """The tensor's ends; the search takes as long as seeing a dozen images."""
        low, high = self._observer.range(BITS, symmetric=False)
        return low.double().cpu(), high.double().cpu()

    def _rounding(self, widths: Tensor) -> float:
        noise = (widths / (2**BITS - 1)).square() / 12
        # a channel that is lost altogether loses no more than its values
        return float((self.weight * noise).minimum(self.energy).sum())


def channel_costs(
    detector: nn.Module,
    inputs: Collection[str],
    outputs: Collection[str],
    weigh: Weigh,
    axis: Callable[[nn.Module], int],
) -> tuple[dict[str, ChannelCost], dict[str, ChannelCost]]:
    """Measures the tensors that layers read and write, over all their calls.

    Args:
        detector: The float detector, in eval mode.
        inputs: Names of the layers whose inputs are measured.
        outputs: Names of those whose outputs are.
        weigh: Runs it, and tells what matters.
        axis: Gives the axis of a layer's channels.

    Returns:
        Layer name to the cost of its inputs, and of its outputs.
    """
    recorded: Recorded = []
    found: tuple[dict, dict] = {}, {}
    axes = {name: axis(detector.get_submodule(name)) for name in (*inputs, *outputs)}

    def keep(side: int, name: str, x: Tensor) -> Tensor:
        # a copy is kept and a copy goes on: either may be written to in place
        recorded.append(((side, name), own_copy(x)))
        return recorded[-1][1].clone()

    def before(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (keep(0, name, args[0]), *args[1:]), kwargs
            key = next(iter(kwargs))
            return args, {**kwargs, key: keep(0, name, kwargs[key])}

        return hook

    def take(key: tuple[int, str], x: Tensor, weight: Tensor | None) -> None:
        side, name = key
        if not x.numel():  # of a head that was given no regions
            return
        if name not in found[side]:
            found[side][name] = ChannelCost(x.shape[axes[name]])
        found[side][name].see(x, weight, axes[name])

    handles = [
        detector.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True) for name in inputs
    ] + [
        detector.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: keep(1, name, out))
        for name in outputs
    ]
    try:
        weigh(recorded, take)
    finally:
        for handle in handles:
            handle.remove()
    return found


def not_weighed(run: Callable[[], Any]) -> Weigh:
    """For where it cannot be told what matters.

    Args:
        run: Calls the detector on some images.
    """

    def weigh(recorded: Recorded, take: Take) -> None:
        recorded.clear()
        with torch.no_grad():
            run()
        for key, x in recorded:
            take(key, x, None)
        recorded.clear()

    return weigh
