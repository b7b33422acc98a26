"""What ONNX Runtime's integer kernels write: codes, from the codes and constants that they read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.quantizers import AffineQuantizer, Quantizer
from mmdet_ptq.wrapping.watching.layers import channel_axis

# in codes; 255 steps of a range that ends at 6 may, rounded, end a hair below it
SLACK = 1e-3
# zero point of symmetric activations in ONNX Runtime, whose kernels for x86 read bytes without sign
SIGNED_ZERO = 128
_INT32 = 2**31 - 1
# how far float32 leaves a bias from the multiple that it was rounded to
ON_GRID = 1e-6
# of the sigmoid, highest power first
_NUMERATOR = (
    4.37031012579801e-11,
    1.15627324459942e-07,
    6.08574864600143e-05,
    8.51377133304701e-03,
    2.48287947061529e-01,
)
_DENOMINATOR = (
    6.10247389755681e-13,
    5.76102136993427e-09,
    6.29106785017040e-06,
    1.70198817374094e-03,
    1.16817656904453e-01,
    9.93151921023180e-01,
)
# elements of it that are computed at once
_PART = 2**15
# clip(a x + b, 0, 1)
HARD_SIGMOID = (1 / 6, 0.5)
# float32 holds every integer up to here, so sums that never leave the range are exact in any order
_FLOAT32 = 2**24


def is_kernel_format(quantizer: Quantizer) -> bool:
    """Whether integer kernels read and write it: 8 bits or fewer, one zero point."""
    return fits_byte(quantizer) and has_one_zero_point(quantizer)


def fits_byte(quantizer: Quantizer) -> bool:
    """Whether its codes are bytes, with one scale or one per channel."""
    return (
        isinstance(quantizer, AffineQuantizer)
        and quantizer.bits <= 8
        and (quantizer.num_channels is None or quantizer.channel_axis == 1)
    )


def has_one_zero_point(quantizer: AffineQuantizer) -> bool:
    """Whether all channels have the same."""
    return bool((quantizer.zero_point == quantizer.zero_point.reshape(-1)[0]).all())


@dataclass
class Result:
    """What a kernel is about to write.

    Attributes:
        ends: Where the ReLUs behind it end: infinity, or 6.
    """

    ends: list[float] = field(default_factory=list, kw_only=True)

    @torch.no_grad()
    def value(self, output: Quantizer) -> Tensor | None:
        """What the kernel's codes stand for; None where no integer kernel computes this."""
        ends = self._clips(output) if is_kernel_format(output) else None
        levels = None if ends is None else self.levels(output)
        if levels is None:
            return None
        levels = levels.clamp(*ends) + output.zero_point.reshape(-1)[0]
        return output.decode(levels.clamp(*output.code_range).to(torch.int32))

    def _clips(self, output: AffineQuantizer) -> tuple[float, float] | None:
        """Where the ReLUs clip, in codes minus zero point, unless the quantizer's own ends do.

        Returns:
            None if a ReLU6 ends at different codes in different channels.
        """
        if not self.ends:
            return -math.inf, math.inf
        last, zero, scale = output.code_range[1], output.zero_point, output.positive_scale().detach()
        end = min(self.ends)
        if math.isinf(end) or bool((end / scale.double() + zero >= last - SLACK).all()):
            return 0.0, math.inf
        steps = (end / scale).round().unique()
        return (0.0, float(steps)) if len(steps) == 1 else None

    def levels(self, output: AffineQuantizer) -> Tensor | None:
        """Codes minus zero point, not clipped yet."""
        raise NotImplementedError


@dataclass
class _Pair(Result):
    """Of two tensors of one shape.

    Attributes:
        a: Codes of the first.
        b: Those of the second.
        quantizers: Theirs.
    """

    a: Tensor
    b: Tensor
    quantizers: tuple[AffineQuantizer, AffineQuantizer]

    def _is_kernel(self, output: AffineQuantizer) -> bool:
        """Whether all three have one scale each."""
        return all(q.num_channels is None for q in (*self.quantizers, output))


@dataclass
class Sum(_Pair):
    """QLinearAdd, after MLAS's kernel for AVX2: fma(a, s_a / s_c, fma(b, s_b / s_c, fixed))."""

    def levels(self, output: AffineQuantizer) -> Tensor | None:
        if not self._is_kernel(output):
            return None
        zero_a, zero_b, zero = (_byte(q.zero_point, q).float() for q in (*self.quantizers, output))
        ratio_a, ratio_b = (q.positive_scale().detach() / output.positive_scale().detach() for q in self.quantizers)
        a, b = (_byte(codes, q) for codes, q in zip((self.a, self.b), self.quantizers, strict=True))
        fixed = zero - _fma(zero_a, ratio_a, zero_b * ratio_b)
        return _fma(a, ratio_a, _fma(b, ratio_b, fixed)).round() - zero


@dataclass
class Product(_Pair):
    """QLinearMul, after MLAS's kernel: the exact product of integers, times s_a s_b / s_c, plus the zero point."""

    def levels(self, output: AffineQuantizer) -> Tensor | None:
        if not self._is_kernel(output):
            return None
        a, b = (codes - q.zero_point for codes, q in zip((self.a, self.b), self.quantizers, strict=True))
        zero = _byte(output.zero_point, output).float()
        scale_a, scale_b, scale = (q.positive_scale().detach() for q in (*self.quantizers, output))
        return ((a * b).float() * (scale_a * scale_b / scale) + zero).round() - zero


@dataclass
class _Single(Result):
    """Of one tensor.

    Attributes:
        x: Its codes.
        quantizer: Its quantizer.
    """

    x: Tensor
    quantizer: AffineQuantizer


@dataclass
class HardSigmoid(_Single):
    """QLinearAdd of a constant: the factor is in the scale, the ends are those of the gate's codes."""

    def levels(self, output: AffineQuantizer) -> Tensor | None:
        if not _is_gate(output):
            return None
        factor, added = (self.x.new_tensor(value, dtype=torch.float32) for value in HARD_SIGMOID)
        scale = output.positive_scale().detach()
        ratio, constant = self.quantizer.positive_scale().detach() * factor / scale, added / scale
        fixed = -(_byte(self.quantizer.zero_point, self.quantizer).float() * ratio)
        return _fma(_byte(self.x, self.quantizer), ratio, constant + fixed).round()


def _is_gate(quantizer: AffineQuantizer) -> bool:
    """Whether its codes are all bytes from 0 to 1."""
    ends = quantizer.decode(torch.tensor(quantizer.code_range, device=quantizer.zero_point.device))
    return (
        quantizer.num_channels is None
        and quantizer.bits == 8
        and bool(((ends - ends.new_tensor([0, 1])).abs() < SLACK).all())
    )


@dataclass
class Average(_Single):
    """QLinearGlobalAveragePool: the exact sum of integers, times one factor."""

    def levels(self, output: AffineQuantizer) -> Tensor | None:
        if output.num_channels is not None:
            return None
        total = (self.x - self.quantizer.zero_point).double().sum((2, 3), keepdim=True).float()
        size = float(self.x.shape[2] * self.x.shape[3])
        scale = self.quantizer.positive_scale().detach() / (output.positive_scale().detach() * size)
        return (total * scale).round()


def by_table(function: Callable[[Tensor], Tensor], x: Tensor, quantizer: AffineQuantizer) -> Tensor:
    """A function of every value that a quantizer wrote, computed once for each of its codes."""
    first, last = quantizer.code_range
    codes = torch.arange(first, last + 1, device=x.device)
    channels = quantizer.num_channels or 1
    table = function(quantizer.decode(codes.expand(1, channels, -1)))
    places = quantizer.encode(x).long() - first
    if channels > 1:
        rows = torch.arange(channels, device=x.device) * len(codes)
        places = places + quantizer.per_channel(rows, x)
    return table.flatten()[places]


def sigmoid(x: Tensor) -> Tensor:
    """ONNX Runtime's: 1/2 + x P(x^2) / Q(x^2) for x within +-18, each step a float32 fused multiply-add."""
    # parts that stay in a processor's cache
    parts = [_sigmoid(part) for part in x.flatten().split(_PART)]
    return torch.cat(parts).view(x.shape)


def _sigmoid(x: Tensor) -> Tensor:
    x = x.clamp(-18, 18)
    square = (x * x).double()

    def polynomial(coefficients: tuple[float, ...]) -> Tensor:
        first, *others = (x.new_tensor(value) for value in coefficients)
        for value in others:
            # the product is exact in float64
            first = (first.double() * square).add_(value.double()).float()
        return first

    return (polynomial(_NUMERATOR) * x / polynomial(_DENOMINATOR) + 0.5).clamp_(0, 1)


def silu(x: Tensor) -> Tensor:
    """ONNX Runtime's, which it calls QuickGelu."""
    return x * sigmoid(x)


@dataclass(frozen=True)
class Call:
    """A call of ``torch.nn.functional.conv2d`` or its siblings, or of ``linear``.

    Attributes:
        function: Which.
        x: Its input, which a layer may have padded.
        weight: Its weight.
        bias: Its bias.
        geometry: Stride, padding, dilation, groups; a linear layer has none.
    """

    function: Callable
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: tuple

    @classmethod
    def of(
        cls,
        function: Callable,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Call:
        """From what it was called with."""
        linear = function is nn.functional.linear
        return cls(function, x, weight, bias, () if linear else (stride, padding, dilation, groups))


@dataclass(frozen=True, eq=False)
class IntegerKernel:
    """The weight of a convolution or linear layer.

    Attributes:
        module: The layer.
        integers: The weight's integers, of its shape, float32.
        scale: Its scale, one per output channel.
    """

    module: nn.Module
    integers: Tensor
    scale: Tensor

    def sum(self, call: Call, source: AffineQuantizer) -> Tensor:
        """The exact sums of products, integers of float32 or float64.

        Args:
            call: The call, of what the source wrote.
            source: The input's quantizer.
        """
        x = source.encode(call.x) - source.per_channel(source.zero_point, call.x)
        largest = max(int((end - source.zero_point).abs().max()) for end in source.code_range)
        # GPUs take shortcuts that round; processors do not
        size = self._exact_channels(_FLOAT32 / max(largest, 1)) if x.device.type == 'cpu' else None
        axis = channel_axis(self.module)
        if size is None:
            return call.function(x.double(), self.integers.double(), None, *call.geometry)
        if size == self.integers.shape[1]:
            return call.function(x.float(), self.integers, None, *call.geometry)
        return sum(
            call.function(part.float(), weight, None, *call.geometry).double()
            for part, weight in zip(x.split(size, axis), self.integers.split(size, 1), strict=True)
        )

    @cached_property
    def sums(self) -> Tensor:
        """Sums of the integers, one per output channel, float64."""
        return self.integers.double().flatten(1).sum(1)

    @cached_property
    def _magnitudes(self) -> Tensor:
        """Sums of their absolute values, one per output channel and input channel of its group."""
        return self.integers.double().abs().reshape(*self.integers.shape[:2], -1).sum(2)

    def _exact_channels(self, limit: float) -> int | None:
        """How many input channels may be added at once, so that no sum of magnitudes exceeds a limit.

        Returns:
            None where the channels cannot be told apart, or one is too much already.
        """
        channels = self.integers.shape[1]
        for parts in range(1, channels + 1 if getattr(self.module, 'groups', 1) == 1 else 2):
            size = -(-channels // parts)
            if max(float(part.sum(1).max()) for part in self._magnitudes.split(size, 1)) <= limit:
                return size
        return None


@dataclass
class ConvolutionSum(Result):
    """QLinearConv: the exact sum of integers, times one factor per output channel.

    Attributes:
        kernel: The convolution's integers.
        total: The sums of products.
        source: The input's quantizer.
    """

    kernel: IntegerKernel
    total: Tensor
    source: AffineQuantizer

    def levels(self, output: AffineQuantizer) -> Tensor | None:
        # every step rounds to float32, in the order in which export writes the constants
        bias, total, scale = self.kernel.module.bias, self.total, self.kernel.scale
        source, target = (q.positive_scale().detach() for q in (self.source, output))
        if source.dim():
            scale, source = scale * source, torch.ones_like(source[0])
        if not has_one_zero_point(self.source):
            # the kernel reads the codes themselves, on whose border there are zero points, too
            shift = self.source.zero_point.double() * self.kernel.sums
            total = total.double() + self._by_channel(shift)
            bias = ((0 if bias is None else bias.double()) - shift * scale.double()).float()
        if target.dim():
            scale = scale * (1 / target)
            bias = None if bias is None else bias / target
            target = torch.ones_like(target[0])
        if bias is not None:
            codes = (bias.double() / (scale * source).double()).round()
            if codes.abs().max() > _INT32:
                return None
            total = total.double() + self._by_channel(codes)
        return (total.float() * self._by_channel(source * scale / target)).round()

    def float_value(self, bias: Tensor | None = None) -> Tensor:
        """The same without an output of few bits: what a kernel writes that ends in float.

        Args:
            bias: What it adds. Defaults to None: the layer's bias.
        """
        bias = self.kernel.module.bias if bias is None else bias
        value = self.total.float() * self._by_channel(self.source.positive_scale().detach() * self.kernel.scale)
        return value if bias is None else value + self._by_channel(bias.detach())

    def _by_channel(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * len(getattr(self.kernel.module, 'kernel_size', ())))


@dataclass
class GemmSum(ConvolutionSum):
    """QGemm, a linear layer over rows or a pointwise convolution: its bias is an integer in float, too."""

    def has_integer_bias(self) -> bool:
        """Whether export finds the bias on the grid of the sums; of calls of several scales it may be on one alone."""
        exact = self._exact(self.kernel.module.bias)
        return bool((exact - exact.round()).abs().max() <= ON_GRID * exact.round().abs().max())

    def float_value(self, bias: Tensor | None = None) -> Tensor:
        """See :meth:`ConvolutionSum.float_value`."""
        bias, total = self.kernel.module.bias if bias is None else bias, self.total
        if bias is not None:
            codes = self._exact(bias).round()
            if codes.abs().max() > _INT32:
                return super().float_value(bias)
            total = total.double() + self._by_channel(codes)
        return total.float() * self._by_channel(self._step())

    def _step(self) -> Tensor:
        return self.kernel.scale * self.source.positive_scale().detach()

    def _exact(self, bias: Tensor) -> Tensor:
        return bias.detach().double() / self._step().double()


def _byte(codes: Tensor, quantizer: AffineQuantizer) -> Tensor:
    """Codes as the graph has them."""
    return codes + SIGNED_ZERO if quantizer.symmetric else codes


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The float32 nearest to a * b + c; the product of a code and a float32 is exact in float64."""
    return (a.double() * b.double() + c.double()).float()
