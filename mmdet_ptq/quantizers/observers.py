"""Observers: statistics of a tensor over the calibration images that become a quantization range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers.histogram import StreamingHistogram
from mmdet_ptq.quantizers.range_search import kl_threshold, mse_range, quantile_range
from mmdet_ptq.registry import OBSERVERS

# elements that enter a histogram per call, at most (extremes always come from all elements)
MAX_SAMPLES = 2**18
# values that must speak before they decide what is clipped
EFFECTIVE = 2000


class Observer:
    """Collects statistics of a tensor and turns them into a range.

    Args:
        num_channels: Channels with their own range; None for one range per tensor. Defaults to None.
        channel_axis: Axis of the channels. Defaults to 1.
    """

    # whether the range depends on how much values matter, see FisherObserver
    weighs = False

    def __init__(self, num_channels: int | None = None, channel_axis: int = 1) -> None:
        self.num_channels, self.channel_axis = num_channels, channel_axis
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def _view(self, x: Tensor) -> Tensor:
        """The tensor as (outer, C, inner), without a copy if it is contiguous."""
        if self.num_channels is None:
            return x.reshape(1, 1, -1)
        axis = self.channel_axis + (x.dim() if self.channel_axis < 0 else 0)
        if not 0 <= axis < x.dim() or x.shape[axis] != self.num_channels:
            raise PTQError(
                f'The observer holds {self.num_channels} channels on axis {self.channel_axis}, but the '
                f'tensor has shape {tuple(x.shape)}.'
            )
        return x.reshape(x.shape[:axis].numel(), self.num_channels, -1)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Takes in one batch; an empty tensor changes nothing.

        Args:
            x: Activations of any shape that has the channels on ``channel_axis``.

        Raises:
            PTQError: If ``x`` holds NaN or infinity, or its channels do not fit.
        """
        if x.numel() == 0:
            return
        view = self._view(x.detach().float())
        low, high = view.amin((0, 2)), view.amax((0, 2))
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise PTQError('The observed tensor holds NaN or infinity (non-finite activations).')
        self._take(view, low, high)

    def _take(self, view: Tensor, low: Tensor, high: Tensor) -> None:
        """Takes in a batch of shape (outer, C, inner) with its extremes of shape (C,)."""
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @torch.no_grad()
    def range(self, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """The range to quantize.

        Args:
            bits: Bits of the codes.
            symmetric: Whether the range must be symmetric around zero.

        Returns:
            Lower and upper end, float32 of shape () or (C,), zero included.

        Raises:
            PTQError: If nothing was observed.
        """
        if self.low is None:
            raise PTQError(
                'An observer was asked for a range before it saw any data: is the layer never run, or the '
                'calibration set empty?'
            )
        low, high = self._range(self.low.clamp_max(0), self.high.clamp_min(0), bits, symmetric)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        low, high = low.float(), high.float()
        return (low, high) if self.num_channels is not None else (low[0], high[0])

    def _range(self, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """The range for extremes of shape (C,) that enclose zero."""
        return low, high


@OBSERVERS.register_module()
class MinMaxObserver(Observer):
    """Least and greatest value over all images."""


@OBSERVERS.register_module()
class MovingAverageObserver(Observer):
    """Exponential moving average of each batch's extremes.

    Args:
        momentum: Share of the past in every update. Defaults to 0.9.
        num_channels: Channels with their own range. Defaults to None.
        channel_axis: Axis of the channels. Defaults to 1.
    """

    def __init__(self, momentum: float = 0.9, num_channels: int | None = None, channel_axis: int = 1) -> None:
        super().__init__(num_channels, channel_axis)
        if not 0 <= momentum < 1:
            raise PTQError(f'`momentum` must be at least 0 and below 1, got {momentum!r}.')
        self.momentum = momentum

    def _take(self, view: Tensor, low: Tensor, high: Tensor) -> None:
        if self.low is None:
            self.low, self.high = low, high
        else:
            self.low = torch.lerp(low, self.low, self.momentum)
            self.high = torch.lerp(high, self.high, self.momentum)


def _sample(view: Tensor) -> Tensor:
    """At most MAX_SAMPLES elements of a tensor of shape (outer, C, inner), as (C, n)."""
    # an odd stride does not fall in step with the even sizes of feature maps
    stride = -(-view.numel() // MAX_SAMPLES) | 1
    inner = min(stride, view.shape[2])
    samples = view[:: -(-stride // inner), :, ::inner] if stride > 1 else view
    return samples.transpose(0, 1).flatten(1)


class HistogramObserver(Observer):
    """Base of the observers that search a range on a histogram of at most ``MAX_SAMPLES`` elements a call."""

    def __init__(self, num_channels: int | None = None, channel_axis: int = 1) -> None:
        super().__init__(num_channels, channel_axis)
        self.histogram: StreamingHistogram | None = None

    def _take(self, view: Tensor, low: Tensor, high: Tensor) -> None:
        super()._take(view, low, high)
        if self.histogram is None:
            self.histogram = StreamingHistogram(len(low), low.device)
        self.histogram.add(_sample(view), low, high)


@OBSERVERS.register_module()
class PercentileObserver(HistogramObserver):
    """Leaves out the outermost elements at either end (symmetric: the largest magnitudes).

    Args:
        percentile: Percentile of the upper end; 100 minus it is that of the lower end. Defaults to 99.99.
        num_channels: Channels with their own range. Defaults to None.
        channel_axis: Axis of the channels. Defaults to 1.
    """

    def __init__(self, percentile: float = 99.99, num_channels: int | None = None, channel_axis: int = 1) -> None:
        super().__init__(num_channels, channel_axis)
        if not isinstance(percentile, int | float) or not 50 < percentile <= 100:
            raise PTQError(f'`percentile` must be a number above 50 and at most 100, got {percentile!r}.')
        self.percentile = percentile

    def _range(self, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        if self.percentile == 100:
            return low, high
        return quantile_range(self.histogram, low, high, self.percentile / 100, symmetric)


@OBSERVERS.register_module()
class KLObserver(HistogramObserver):
    """Clips where the clipped and quantized distribution stays nearest to the observed one, by KL divergence.

    TensorRT's entropy calibration (Migacz, GTC 2017) on magnitudes; the threshold clips both ends. With as many levels
    as histogram bins there is nothing to choose, and the whole range is kept.
    """

    def _range(self, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        # codes for a magnitude: all of them if nothing is negative and the codes are unsigned, else half
        threshold = kl_threshold(
            self.histogram, 2 ** (bits - 1), 2**bits if not symmetric else 2 ** (bits - 1), low < 0
        )
        return torch.maximum(low, -threshold), torch.minimum(high, threshold)


@OBSERVERS.register_module()
class MSEObserver(HistogramObserver):
    """Searches the ends with the least squared quantization error, by coordinate descent on the histogram.

    The default for weights. Codes finer than the histogram's bins (16 bits) keep the whole range.
    """

    def _range(self, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        return mse_range(self.histogram, low, high, bits, symmetric)


@OBSERVERS.register_module()
class FisherObserver(MSEObserver):
    """Searches the ends with the least squared error where each value counts as it matters to the detections.

    The default for activations. A few values that no detection depends on, far out as those at the border of an image
    often are, decide the plain squared error; here they count next to nothing. Clipping changes many channels of a
    place at once and the same way; such errors add up, where those of rounding cancel out, and count as often as the
    root of the number of channels. What matters is told by :meth:`weigh`.

    Channels of which nothing is told, or for which too few values speak, count all their values alike: of small maps a
    channel has few, and ends that suit the images at hand clip others. How many speak is Kish's effective sample size,
    ``(sum w)^2 / sum w^2``.
    """

    weighs = True

    def __init__(self, num_channels: int | None = None, channel_axis: int = 1) -> None:
        super().__init__(num_channels, channel_axis)
        self.weighed: StreamingHistogram | None = None
        self.sums = self.squares = 0.0
        self.together = 1.0

    @torch.no_grad()
    def weigh(self, x: Tensor, weight: Tensor) -> None:
        """Takes in how much the values of a tensor matter.

        Args:
            x: Activations as :meth:`update` takes them.
            weight: Their diagonal Fisher information, of the same shape, up to a factor that all tensors share.
        """
        view = self._view(x.float())
        # between 1, were the channels of a place clipped one by one, and their number, were all clipped at once
        self.together = math.sqrt(x.shape[self.channel_axis]) if x.dim() > 1 else 1.0
        weights = self._view(weight.float())
        if self.weighed is None:
            self.weighed = StreamingHistogram(view.shape[1], view.device, weighted=True)
        self.weighed.add(_sample(view), view.amin((0, 2)), view.amax((0, 2)), _sample(weights))
        # squares of gradients of detectors are beyond single precision when squared again
        self.sums = self.sums + weights.sum((0, 2), dtype=torch.float64)
        self.squares = self.squares + weights.double().square().sum((0, 2))

    def _range(self, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        if self.weighed is None:
            return super()._range(low, high, bits, symmetric)
        weighted = self.weighed.by_weight()
        ends = mse_range(weighted, low, high, bits, symmetric, self.weighed, self.together)
        few = self.sums**2 < EFFECTIVE * self.squares.clamp(min=torch.finfo(torch.float64).tiny)
        plain = ends
        if bool(few.any()):
            plain = mse_range(self.histogram or self.weighed, low, high, bits, symmetric)
        return torch.where(few, plain[0], ends[0]), torch.where(few, plain[1], ends[1])
