"""Uniform affine quantization, in the arithmetic of ONNX QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers.base import SCALE_FLOOR, Quantizer, check_bits, check_finite
from mmdet_ptq.quantizers.saturation import SUM_LIMIT, Neighbours
from mmdet_ptq.registry import QUANTIZERS

# clip ratios tried by `fit_weight`: a coarse sweep, then a fine one around its best
COARSE, FINE, _LEAST_RATIO = 60, 20, 0.04
# tensors above this many elements are quantized sample by sample on a CPU, so that the passes stay in its cache
_TILE = 2**18


def _clip_levels(u: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Integers ``u`` (overwritten) to clipped levels relative to the zero point.

    The zero point is added even where it is 0: it turns -0.0 into 0.0, as the detour through integers does.
    """
    return u.add_(zero).clamp_(low, high).sub_(zero)


def _simulate(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Quantize-dequantize with in-place passes.

    On (8, 32, 104, 104), one thread of a busy machine, in the same run: this function 13.5 ms,
    ``torch.fake_quantize_per_tensor_affine`` 76 ms. On a quiet machine an untiled variant that multiplies by 1 / scale
    took 5.8 ms against 18 ms. Division costs about the same as multiplying, and is what ONNX prescribes.
    """
    tiled = x.device.type == 'cpu' and x.dim() > 2 and x.numel() > _TILE and (scale.dim() == 0 or scale.shape[0] == 1)
    if not tiled:
        return _clip_levels(torch.div(x, scale).round_(), zero, low, high).mul_(scale)
    out = torch.empty_like(x)
    scale, zero = (t[0] if t.dim() else t for t in (scale, zero))
    for sample, y in zip(x.unbind(0), out.unbind(0), strict=True):
        torch.div(sample, scale, out=y)
        _clip_levels(y.round_(), zero, low, high).mul_(scale)
    return out


def _row_errors(rounded: Tensor, matrix: Tensor, factor: Tensor | None) -> Tensor:
    error = (rounded - matrix).square_()
    return (error if factor is None else error.mul_(factor)).sum(1)


def _reduce_to(x: Tensor, shape: torch.Size) -> Tensor:
    return x.sum() if len(shape) == 0 else x.sum([i for i in range(x.dim()) if shape[i] == 1], keepdim=True)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through gradient for the input, LSQ's for the scale (Esser et al., ICLR 2020, equations 3 and 5).

    Forward and backward on the tensor above, one thread of a busy machine, in the same run: 62 ms, against 100 ms for
    ``torch._fake_quantize_learnable_per_tensor_affine``.
    """

    @staticmethod
    def forward(ctx, x, scale, zero, low, high, factor):
        y = _simulate(x, scale, zero, low, high)
        ctx.save_for_backward(x, scale, zero)
        ctx.consts = low, high, factor
        # not saved as autograd does it: a detector may write into what a layer returned
        ctx.output, ctx.version = y.detach(), y._version
        return y

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero = ctx.saved_tensors
        low, high, factor = ctx.consts
        u = torch.div(x, scale).add_(zero)
        # passes the gradient where low - 1/2 < u < high + 1/2
        grad_x = torch.ops.aten.hardtanh_backward(grad, u, low - 0.5, high + 0.5)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            unchanged = ctx.output._version == ctx.version
            y = ctx.output if unchanged else _simulate(x, scale, zero, low, high)
            # y / scale outside the range, (y - x) / scale inside; subtracted element by element to keep the digits
            total = torch.mul(grad, y, out=u).addcmul_(grad_x, x, value=-1)
            grad_scale = _reduce_to(total, scale.shape).div_(scale).mul_(factor)
        return grad_x, grad_scale, None, None, None, None


class _LearnedRounding(torch.autograd.Function):
    """scale * (clip(floor(x / scale) + rounding + zero) - zero), AdaRound (Nagel et al., ICML 2020, equation 22)."""

    @staticmethod
    def forward(ctx, x, scale, zero, rounding, low, high, factor):
        levels = torch.div(x, scale).floor_().add_(rounding)
        inside = (levels + zero >= low) & (levels + zero <= high)
        y = _clip_levels(levels, zero, low, high).mul_(scale)
        ctx.save_for_backward(x, scale, y, inside)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx, grad):
        x, scale, y, inside = ctx.saved_tensors
        grad_x = grad * inside
        grad_scale = _reduce_to(grad * y - grad_x * x, scale.shape) / scale * ctx.factor
        return grad_x, grad_scale, None, grad_x * scale, None, None, None


class _BoundedScale(torch.autograd.Function):
    """The scale within bounds, with the gradient passed on so that one driven out of them finds its way back."""

    @staticmethod
    def forward(ctx, scale, limit):
        return scale.clamp(limit.new_tensor(SCALE_FLOOR), limit)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@QUANTIZERS.register_module()
class AffineQuantizer(Quantizer):
    """Uniform quantization: x_hat = scale * (clip(round(x / scale) + zero_point) - zero_point).

    The gradient is LSQ's, with factor 1 / sqrt(elements per scale * highest level) on the scale. The scale that enters
    lies between ``SCALE_FLOOR`` and ``scale_limit``, with a straight-through gradient. Half precision is quantized in
    float32.

    Args:
        bits: 2 to 8, or 16. Defaults to 8.
        symmetric: Signed codes with zero point 0; otherwise unsigned codes. Defaults to False.
        num_channels: Channels with their own scale; None for one per tensor. Defaults to None.
        channel_axis: Axis of the channels. Defaults to 1.
        narrow_range: Leave out the lowest code, as some int8 kernels want. Defaults to False.
        shared_zero_point: One zero point for all channels, as kernels want it of activations: their padding is
            one code. Defaults to False.
        learn_scale: Offer the scale for training. Defaults to True.
        neighbours: Of weights, rows (C, K): arguments of
            :class:`mmdet_ptq.quantizers.saturation.Neighbours`. Two levels that are neighbours never exceed the sum
            that integer kernels add in 16 bits; what would is treated as clipped. Defaults to None: no bound.
    """

    style = 'affine'
    uniform = True

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = False,
        num_channels: int | None = None,
        channel_axis: int = 1,
        narrow_range: bool = False,
        shared_zero_point: bool = False,
        learn_scale: bool = True,
        neighbours: Mapping[str, Any] | None = None,
    ) -> None:
        check_bits(bits, (2, 3, 4, 5, 6, 7, 8, 16), '2..8 or 16')
        super().__init__(bits, num_channels, channel_axis)
        self.symmetric = bool(symmetric)
        self.narrow_range = bool(narrow_range)
        self.shared_zero_point = bool(shared_zero_point)
        self.learn_scale = bool(learn_scale)
        self.neighbours = None if neighbours is None else Neighbours(**neighbours)
        self.scale = nn.Parameter(torch.ones(self.param_shape), requires_grad=self.learn_scale)
        self.register_buffer('zero_point', torch.zeros(self.param_shape, dtype=torch.int32))
        self.register_buffer('scale_limit', torch.full(self.param_shape, math.inf))

    @property
    def code_range(self) -> tuple[int, int]:
        half = 2 ** (self.bits - 1)
        low, high = (-half, half - 1) if self.symmetric else (0, 2 * half - 1)
        return low + self.narrow_range, high

    def any_param(self) -> Tensor:
        return self.scale

    def positive_scale(self) -> Tensor:
        """The scale as it enters the arithmetic, of shape () or (C,)."""
        return _BoundedScale.apply(self.scale, self.scale_limit)

    def learnable(self) -> dict[str, nn.Parameter]:
        return {'scale': self.scale} if self.learn_scale else {}

    @property
    def has_zero_point(self) -> bool:
        return not self.symmetric

    def spec(self) -> dict[str, Any]:
        return dict(
            type=self.type_name(),
            bits=self.bits,
            symmetric=self.symmetric,
            num_channels=self.num_channels,
            channel_axis=self.channel_axis,
            narrow_range=self.narrow_range,
            shared_zero_point=self.shared_zero_point,
            learn_scale=self.learn_scale,
            **({} if self.neighbours is None else dict(neighbours=self.neighbours.spec())),
        )

    def forward(self, x: Tensor, rounding: Tensor | None = None) -> Tensor:
        """Simulated quantization.

        Args:
            x: The tensor to quantize.
            rounding: Learned rounding h in [0, 1], of the shape of ``x``: the level is
                floor(x / scale) + h. Defaults to None, which rounds to the nearest.

        Returns:
            Quantized values, of the shape and type of ``x``.
        """
        if x.numel() == 0:
            return x
        dtype = x.dtype
        x = x.float()
        scale = self.per_channel(self.positive_scale(), x)
        zero = self.per_channel(self.zero_point, x).float()
        low, high = self.code_range
        factor = 1 / math.sqrt(max(x.numel() // self.scale.numel(), 1) * high)
        if rounding is not None:
            y = _LearnedRounding.apply(x, scale, zero, rounding.float(), low, high, factor)
        elif torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            y = _FakeQuantize.apply(x, scale, zero, low, high, factor)
        else:
            y = _simulate(x, scale, zero, low, high)
        if self.neighbours is not None:
            y = self._bound(y, None if rounding is not None else x, scale, zero, factor)
        return y.to(dtype)

    def _bound(self, y: Tensor, x: Tensor | None, scale: Tensor, zero: Tensor, factor: float = 1.0) -> Tensor:
        """Quantized values within the bound of :class:`Neighbours`.

        Args:
            y: Quantized values, (C, K).
            x: The tensor that they come from; None where its rounding is learned.
            scale: The scale, broadcast.
            zero: The zero point, broadcast.
            factor: LSQ's of the scale's gradient, to which what is bounded adds as what is clipped does. Defaults to 1.
        """
        with torch.no_grad():
            levels = torch.div(y, scale).reshape(-1, self.neighbours.size)
            position = None
            if x is None:
                # relaxed levels; those that are integers are not quite after the division
                levels = torch.where((levels - levels.round()).abs() < 1e-4, levels.round(), levels)
            else:
                levels = levels.round_()
                position = self._position(x, scale, zero)
            levels, changed = self.neighbours.bound(levels, position)
        if changed is None:
            return y
        fixed = scale.detach()
        learned = fixed + factor * (scale - fixed)
        return torch.where(changed.view(y.shape), levels.view(y.shape) * learned, y)

    @torch.no_grad()
    def encode(self, x: Tensor, rounding: Tensor | None = None) -> Tensor:
        """Integer codes.

        Args:
            x: The tensor to quantize.
            rounding: Learned rounding; up where it is 1/2 or more. Defaults to None.

        Returns:
            Codes within ``code_range``, torch.int32.

        Raises:
            PTQError: If ``x`` is empty or holds NaN or infinity.
        """
        check_finite(x, 'tensor')
        x = x.float()
        scale = self.per_channel(self.positive_scale(), x)
        u = torch.div(x, scale)
        zero, (low, high) = self.per_channel(self.zero_point, x).float(), self.code_range
        u = u.round_() if rounding is None else u.floor_().add_(rounding >= 0.5)
        codes = u.add_(zero).clamp_(low, high)
        if self.neighbours is not None:
            position = None if rounding is not None else self._position(x, scale, zero)
            levels = (codes - zero).reshape(-1, self.neighbours.size)
            codes = self.neighbours.bound(levels, position)[0].view(codes.shape) + zero
        return codes.to(torch.int32)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        zero = self.per_channel(self.zero_point, codes)
        return (codes.to(torch.int32) - zero).float().mul_(self.per_channel(self.positive_scale(), codes))

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        neighbours, self.neighbours = self.neighbours, None
        try:
            return self(x)
        finally:
            self.neighbours = neighbours

    @torch.no_grad()
    def code_position(self, x: Tensor) -> Tensor:
        zero = self.per_channel(self.zero_point, x)
        return torch.div(x.float(), self.per_channel(self.positive_scale(), x)) + zero

    @torch.no_grad()
    def step_size(self) -> float:
        return float(self.step_sizes().mean())

    @torch.no_grad()
    def step_sizes(self) -> Tensor:
        return self.positive_scale().detach().clone()

    def _params_of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for a range that contains zero; a range of nothing but zero gets scale 1."""
        first, last = self.code_range
        if self.shared_zero_point and not self.symmetric and low.dim() == 1 and self.num_channels is not None:
            return self._params_of_shared_zero(low, high)
        if self.symmetric:
            scale = torch.maximum(low / first, high / last)
        else:
            scale = (high - low) / (last - first)
        scale = torch.where(high - low > 0, scale.clamp_min(SCALE_FLOOR), torch.ones_like(scale))
        zero = torch.zeros_like(scale) if self.symmetric else (first - low / scale).round().clamp(first, last)
        return scale, zero

    def _params_of_shared_zero(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The zero point that costs least: the mean square of how much wider it makes the channels' steps."""
        (first, last), live = self.code_range, high - low > 0
        if not live.any():
            return torch.ones_like(low), torch.full_like(low, first)
        low_live, high_live = low[live], high[live]
        start, stop = first, last
        for step in (256, 1):  # the cost is convex: the best of all codes lies around the best of every 256th
            zero = torch.arange(start, stop + 1, step, dtype=low.dtype, device=low.device)[:, None]
            # no codes on a side that holds values: an infinite step
            below, above = (
                torch.where(end == 0, 0, end / codes)
                for end, codes in ((-low_live, zero - first), (high_live, last - zero))
            )
            scales = torch.maximum(below, above)
            best = int((scales / (high_live - low_live)).square().mean(1).argmin())
            start, stop = max(first, int(zero[best]) - step), min(last, int(zero[best]) + step)
        scale = torch.ones_like(low)
        scale[live] = scales[best].clamp_min(SCALE_FLOOR)
        return scale, zero[best].expand_as(scale)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Sets scale and zero point so that the codes cover [low, high], widened to contain zero.

        Args:
            low: Lower end, of shape () or (C,).
            high: Upper end, of the same shape.

        Raises:
            PTQError: If an end is not finite, or the lower one is above the upper one.
        """
        low, high = (torch.as_tensor(t, dtype=torch.float32, device=self.scale.device) for t in (low, high))
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise PTQError('The range of a quantizer holds NaN or infinity (non-finite range).')
        if (low > high).any():
            raise PTQError('The lower end of a quantizer range is above its upper end.')
        try:
            low, high = low.clamp_max(0).expand(self.param_shape), high.clamp_min(0).expand(self.param_shape)
        except RuntimeError:
            raise PTQError(
                f'A range of shape {tuple(low.shape)} does not fit a quantizer whose scale has shape '
                f'{self.param_shape}.'
            ) from None
        scale, zero = self._params_of_range(low.double(), high.double())
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)
        self.scale_limit.fill_(math.inf)

    @torch.no_grad()
    def fit_activation(self, observer: Any) -> None:
        """Sets the range that an observer chooses; training then widens it at most to all that the observer saw.

        Codes beyond the largest activation say nothing, and a runtime can leave a ReLU6 to the quantizer behind it only
        if the range ends at 6.

        Args:
            observer: Has seen the calibration images.

        Raises:
            PTQError: If the observer saw nothing, or values that are not finite.
        """
        low, high = observer.range(self.bits, self.symmetric)
        self.set_range(low, high)
        low, high = (end.to(self.scale).reshape(self.param_shape) for end in (observer.low, observer.high))
        dead = (low == 0) & (high == 0)
        if dead.any() and not dead.all():
            # a channel that was always zero gets the widest range of the others, where nothing says more
            self.scale.copy_(torch.where(dead, self.scale[~dead].max(), self.scale))
        first, last = (code - self.zero_point for code in self.code_range)
        # a zero point at an end leaves no codes on that side
        ends = [
            torch.where(codes != 0, end / codes, 0)
            for end, codes in ((low.clamp_max(0), first), (high.clamp_min(0), last))
        ]
        self.scale_limit.copy_(torch.maximum(torch.maximum(*ends), self.scale))

    @torch.no_grad()
    def fit_weight(self, weight: Tensor, observer: Any = None, importance: Tensor | None = None) -> None:
        """Sets the range from a weight.

        Args:
            weight: Weight with the channels on ``channel_axis``.
            observer: Gives the range from its statistics of the weight. Defaults to None, which
                searches clip ratios for the least squared error on the weight itself.
            importance: Factor of the squared error, broadcastable to ``weight``. Defaults to None.

        Raises:
            PTQError: If the weight holds NaN or infinity, or a shape does not fit.
        """
        check_finite(weight, 'weight')
        if observer is not None:
            observer.update(weight)
            self.set_range(*observer.range(self.bits, self.symmetric))
            if self.neighbours is not None:
                self.rescale(self._widening(weight.detach().float()).view(self.param_shape))
            return
        matrix, factor = self.as_matrix(weight), self.importance_matrix(importance, weight)
        rows = max(1, _TILE // matrix.shape[1])
        tiles = matrix.split(rows)
        factors = [None] * len(tiles) if factor is None else factor.split(rows)
        found = [self._search_range(m, f) for m, f in zip(tiles, factors, strict=True)]
        scale, zero = (torch.cat(parts).view(self.param_shape) for parts in zip(*found, strict=True))
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)
        if self.shared_zero_point:
            self.set_range(*(scale * (code - zero) for code in self.code_range))

    def _search_range(self, matrix: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each row with the least squared error over a grid of clip ratios.

        The whole range is shrunk first; around the best ratio a finer grid follows, for an asymmetric range on each
        end by itself too.
        """
        low, high = matrix.amin(1).clamp_max(0), matrix.amax(1).clamp_min(0)
        if self.neighbours is not None:
            # so wide that no sum is too large: clip ratios begin there
            scale, zero = self._params_of_range(low, high)
            wider = self.neighbours.largest_sum((matrix / scale[:, None]).reshape(-1, self.neighbours.size))
            wider = wider.view(len(matrix), -1).amax(1).div_(SUM_LIMIT).clamp_(min=1)
            low, high = low * wider, high * wider
        coarse = (torch.linspace(1, _LEAST_RATIO, COARSE) - 1).tolist()
        step = coarse[0] - coarse[1]
        fine = torch.linspace(-step, step, FINE + 1).tolist()
        sweeps = [(coarse, (1, 1)), (fine, (1, 1))] + ([] if self.symmetric else [(fine, (1, 0)), (fine, (0, 1))])
        ratios = torch.ones(2, len(matrix), device=matrix.device)
        best = torch.full_like(low, math.inf)
        scale, zero = self._params_of_range(low, high)
        for shifts, ends in sweeps:
            start, ends = ratios, ratios.new_tensor(ends).view(2, 1)
            for shift in shifts:
                trial = (start + shift * ends).clamp(_LEAST_RATIO / 4, 1)
                s, z = self._params_of_range(low * trial[0], high * trial[1])
                rounded = _simulate(matrix, s[:, None], z[:, None], *self.code_range)
                error = _row_errors(rounded, matrix, factor)
                better = error < best
                if self.neighbours is not None and better.any():
                    # the bound only adds to an error
                    rows = better.nonzero()[:, 0]
                    rounded = self._bound(rounded[rows], matrix[rows], s[rows, None], z[rows, None])
                    error[rows] = _row_errors(rounded, matrix[rows], None if factor is None else factor[rows])
                    better = error < best
                best, scale, zero = (
                    torch.where(better, new, old) for new, old in ((error, best), (s, scale), (z, zero))
                )
                ratios = torch.where(better, trial, ratios)
        return scale, zero

    def _position(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Where a weight lies in units of its scale, within the codes; rows."""
        low, high = self.code_range
        return torch.div(x, scale).add_(zero).clamp_(low, high).sub_(zero).reshape(-1, self.neighbours.size)

    def _widening(self, weight: Tensor) -> Tensor:
        """By how much a range, which may clip, must be wider so that no sum of neighbours is too large; at least 1."""
        scale, zero = (self.per_channel(t, weight) for t in (self.positive_scale(), self.zero_point))
        sums = self.neighbours.largest_sum(self._position(weight, scale, zero))
        return sums.view(self.scale.numel(), -1).amax(1).div_(SUM_LIMIT).clamp_(min=1)
