"""Log-affine quantization of weights: fine steps near the location, wide steps in the tails, one int8 table a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError, check_choice
from mmdet_ptq.quantizers import log_grid
from mmdet_ptq.quantizers.base import SCALE_FLOOR, Quantizer, check_bits, check_finite
from mmdet_ptq.quantizers.log_fit import fit_log_affine
from mmdet_ptq.quantizers.saturation import SUM_LIMIT
from mmdet_ptq.registry import QUANTIZERS

_MODES = ('log1p', 'exact', 'shift', 'auto')
_LOCATIONS = ('auto', 'zero', 'median')


def unit_and_size(s: Tensor) -> tuple[Tensor, Tensor]:
    """What weights are divided by, and what levels are multiplied with, for scales ``s``.

    A scale of exactly 0 marks a channel of one value (all zero, say): it is divided by 1 and multiplied with 0, so that
    the output is the location itself. Every other scale counts by its absolute value, at least SCALE_FLOOR, so that a
    training step across zero does no harm.
    """
    size = torch.where(s == 0, s, s.abs().clamp_min(SCALE_FLOOR))
    return torch.where(s == 0, torch.ones_like(s), size), size


class _LogFakeQuantize(torch.autograd.Function):
    """w_hat = mu + s * sigma * dh for a (C, K) weight, with straight-through gradients.

    With m = 1[y within the codes], D = d(dh)/d(yh) and yh the code plus 1/2, the rounding of codes and table passed
    straight through, mode 'log1p' gives

    - dw = m (dh + eps) / (|d| + eps), dmu = 1 - dw, ds = sigma dh - d dw
    - dk = sigma (dh + eps) (ln 2 / k^2) (m y - yh)
    - deps = (sigma / eps) (dh - m |d| (dh + eps) / (|d| + eps))
    - dh(V) = m sigma D, for learned rounding

    in units of s; ds carries the factor 1 / sqrt(K * count) of LSQ (Esser et al., ICLR 2020). Modes 'exact' and
    'shift' follow from their psi and decoder in the same way.
    """

    @staticmethod
    def forward(ctx, x, mu, s, k, offset, rounding, grid, located):
        mode, count = grid.mode, grid.count
        unit, size = unit_and_size(s)
        d = (x - mu) / unit
        minus = log_grid.sign_bit(d)
        place = mu if located else None
        if rounding is None:
            code, inside = grid.encode(d), None
            c = grid.magnitude_code(minus, code)
            out = grid.value(code, place, size)
        else:
            k, offset = grid.side_params(minus)
            c = torch.floor(log_grid.psi(mode, d.abs(), k, offset) - 0.5) + rounding
            inside = (c >= 0) & (c <= count - 1)
            c = c.nan_to_num(0, count, 0).clamp_(0, count - 1)
            out = grid.value(grid.code(minus, c.round().to(torch.int32)), place, size)
            # between two codes the unrounded level counts, on a code the table's entry
            soft = (1 - 2 * minus) * log_grid.inverse(mode, c + 0.5, k, offset)
            out = torch.where(c == c.round(), out, mu + size * soft)
        ctx.save_for_backward(x, mu, s, c, inside)
        ctx.grid = grid
        # a table index cannot carry NaN on, the value must
        return torch.where(torch.isfinite(x), out, math.nan)

    @staticmethod
    def backward(ctx, grad):
        x, mu, s, c, inside = ctx.saved_tensors
        grid = ctx.grid
        mode = grid.mode
        unit, size = unit_and_size(s)
        d = (x - mu) / unit
        minus = log_grid.sign_bit(d)
        # the logarithm of 'exact' and 'shift' is infinite at 0
        magnitude = d.abs().clamp_min(0 if mode == 'log1p' else torch.finfo(x.dtype).tiny)
        k, offset = grid.side_params(minus)
        y = log_grid.psi(mode, magnitude, k, offset)
        inside = ((y >= 0) & (y < grid.count) if inside is None else inside).to(x.dtype)
        yh = c.to(x.dtype) + 0.5
        level = log_grid.inverse(mode, yh, k, offset)
        slope = log_grid.slope(mode, level, k, offset)
        if mode == 'log1p':
            dw = inside * (level + offset) / (magnitude + offset)
        else:
            dw = inside * slope * k / (math.log(2) * magnitude)

        def sides() -> tuple[Tensor, Tensor]:
            if mode == 'log1p':
                return slope * (inside * y - yh) / k, (level - dw * magnitude) / offset
            dk = slope * inside * (y - offset) / k
            return dk - slope * (yh - offset) / k if mode == 'exact' else dk, slope * (inside - 1)

        # the table is fixed in most trainings
        dk, doff = sides() if ctx.needs_input_grad[3] or ctx.needs_input_grad[4] else (None, None)
        # a channel of one value has no scale to learn, and its output does not follow the weight
        dw = dw * (s != 0)

        signed = grad * (1 - 2 * minus)
        grad_x = grad * dw
        factor = torch.sign(s) / math.sqrt(x.shape[1] * grid.count)
        grad_s = (signed * level - grad_x * d).sum(1, keepdim=True) * factor
        in_units = signed * size

        def per_side(slopes: Tensor | None) -> Tensor | None:
            if slopes is None:
                return None
            total = in_units * slopes
            below = (total * minus).sum()
            return torch.stack([total.sum() - below, below])

        grad_rounding = in_units * slope * inside if ctx.needs_input_grad[5] else None
        return (
            grad_x,
            (grad - grad_x).sum(1, keepdim=True),
            grad_s,
            per_side(dk),
            per_side(doff),
            grad_rounding,
            None,
            None,
        )


@QUANTIZERS.register_module()
class LogAffineQuantizer(Quantizer):
    """Log-affine weight quantizer (after Reg-PTQ, Ding et al., CVPR 2024; the grids are our reconstruction).

    d = (w - mu_c) / s_c is split by its sign; each side has its own slope k and offset, shared by the layer's channels:

    - 'log1p': y = k log2(1 + |d| / eps), the default;
    - 'exact': y = k log2 |d| + a with its exact inverse;
    - 'shift': the same y, decoded to powers of two as published, at 2 to 4 bits only: 2^(bits - 1) octaves do not fit
      an int8 table beyond that (8 of them reach 128; the table's end is 127).

    The code of a magnitude is clip(floor(y)), decoded at the middle of its bin; the levels of a layer are rounded to
    **one int8 table**, and w_hat = mu_c + (s_c * step) * table[code]; where there is a location, this is rounded to
    integers of the same range in each channel, see ``integer_levels``. Zero is not a level (as in any mid-rise grid),
    except in a channel of a single value: its s_c is 0 and its output mu_c, so an all-zero channel stays exactly zero.

    Args:
        bits: 2 to 8; 2 to 4 in mode 'shift'. Defaults to 4.
        num_channels: Output channels, on axis 0, with their own mu and s. Defaults to None.
        mode: 'log1p', 'exact', 'shift', or 'auto', which ``resolve_auto`` replaces. Defaults to 'log1p'.
        location: 'zero' fixes mu at 0, 'median' learns it, 'auto' learns it where it takes more than 2 % off the
            squared error when the weight is fitted (``spec`` then tells 'median' or 'zero'). Defaults to 'auto'.
        learn: Offer the parameters for training. Defaults to True.
        table_max: The largest integer of the table, 64 or 127. No sum of two products with integers up to 64
            leaves 16 bits, see :mod:`mmdet_ptq.quantizers.saturation`. Defaults to 127.
    """

    style = 'log-affine'

    def __init__(
        self,
        bits: int = 4,
        num_channels: int | None = None,
        mode: str = 'log1p',
        location: str = 'auto',
        learn: bool = True,
        table_max: int = log_grid.TABLE_MAX,
    ) -> None:
        check_choice('mode', mode, _MODES)
        check_choice('location', location, _LOCATIONS)
        check_bits(bits, (2, 3, 4, 5, 6, 7, 8), '2..8 for a log-affine quantizer')
        if mode == 'shift':
            check_bits(bits, (2, 3, 4), "2..4 in mode 'shift', whose powers of two outgrow an int8 table beyond")
        super().__init__(bits, num_channels, channel_axis=0)
        if table_max not in (SUM_LIMIT // 2, log_grid.TABLE_MAX):
            raise PTQError(f'`table_max` must be {SUM_LIMIT // 2} or {log_grid.TABLE_MAX}, got {table_max!r}.')
        self.mode, self.requested_location, self.learn = mode, location, bool(learn)
        self.table_max = int(table_max)
        self.count = 2 ** (bits - 1)
        self._last_grid: log_grid.Grid | None = None
        self.s = nn.Parameter(torch.ones(self.param_shape), requires_grad=self.learn)
        self._set_location(location)
        k, offset = log_grid.initial_side('log1p' if mode == 'auto' else mode, bits)
        self.log_k = nn.Parameter(torch.full((2,), math.log(k)), requires_grad=self.learn)
        # 'log1p' keeps eps positive through its logarithm, a may have any sign
        self._offset_name = 'a' if mode in ('exact', 'shift') else 'log_eps'
        start = torch.full((2,), offset if self._offset_name == 'a' else math.log(offset))
        setattr(self, self._offset_name, nn.Parameter(start, requires_grad=self.learn))

    def _set_location(self, location: str) -> None:
        """Makes mu a parameter, or a zero buffer for location 'zero'."""
        zeros = torch.zeros_like(self.s.detach())
        if 'mu' in self._parameters or 'mu' in self._buffers:
            del self.mu
        if location == 'zero':
            self.register_buffer('mu', zeros)
        else:
            self.mu = nn.Parameter(zeros, requires_grad=self.learn)
        self.location = location

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, 2 * self.count - 1

    def any_param(self) -> Tensor:
        return self.s

    def learnable(self) -> dict[str, nn.Parameter]:
        """Parameters to train: 'mu' (unless fixed at 0), 's', 'k' (its logarithm), 'eps' (its logarithm, or a)."""
        if not self.learn:
            return {}
        found = {'s': self.s, 'k': self.log_k, 'eps': getattr(self, self._offset_name)}
        return found if self.location == 'zero' else {'mu': self.mu, **found}

    def spec(self) -> dict[str, Any]:
        return dict(
            type=self.type_name(),
            bits=self.bits,
            num_channels=self.num_channels,
            mode=self.mode,
            location=self.location,
            learn=self.learn,
            **({} if self.table_max == log_grid.TABLE_MAX else dict(table_max=self.table_max)),
        )

    def side_params(self) -> tuple[Tensor, Tensor]:
        """Slopes k and offsets (eps or a) of both sides, each of shape (2,)."""
        if self.mode == 'auto':
            raise PTQError(
                "A quantizer with `mode='auto'` must be resolved with `resolve_auto(cfg, weight)` before use."
            )
        offset = getattr(self, self._offset_name)
        return self.log_k.exp(), offset.exp() if self._offset_name == 'log_eps' else offset

    def _grid(self) -> log_grid.Grid:
        sides = self.side_params()
        # compared by value: whoever writes into `.data` leaves no other trace
        if self._last_grid is None or not self._last_grid.is_of(*sides):
            self._last_grid = log_grid.Grid(self.mode, self.count, *sides, self.table_max)
        return self._last_grid

    @torch.no_grad()
    def table(self) -> Tensor:
        """The layer's int8 table of 2^bits entries in ascending order, indexed by the code.

        Code ``2^(bits-1) + c`` is magnitude ``c`` at or above the location, code ``2^(bits-1) - 1 - c`` below it.
        """
        return self._grid().table

    @torch.no_grad()
    def table_scale(self) -> Tensor:
        """What a table entry is worth, of shape () or (C,): w_hat = mu + table_scale * table[code], up to rounding."""
        return unit_and_size(self.s)[1] * self._grid().step

    @torch.no_grad()
    def integer_levels(self) -> tuple[Tensor, Tensor]:
        """What integer kernels compute with: w_hat = scale * levels[code].

        Returns:
            Levels of shape (1, 2^bits), the table, or with a location (C, 2^bits), torch.int32
            from -table_max to table_max; and their scale, of shape (C,).
        """
        if self.location == 'zero':
            return self.table().to(torch.int32)[None], self.table_scale().reshape(-1)
        mu, s = self._columns()
        levels, scale = self._grid().integer_levels(mu, unit_and_size(s)[1])
        return levels.to(torch.int32), scale.reshape(-1)

    def _columns(self) -> tuple[Tensor, Tensor]:
        return self.mu.reshape(-1, 1), self.s.reshape(-1, 1)

    def _rows(self, x: Tensor) -> Tensor:
        self.per_channel(self.s, x)
        return x.float().reshape(self.s.numel(), -1)

    def forward(self, x: Tensor, rounding: Tensor | None = None) -> Tensor:
        """Simulated quantization with the rounded table.

        Args:
            x: Weight of shape (C, ...).
            rounding: Learned rounding h in [0, 1], of the shape of ``x``: the code is
                clip(floor(y - 1/2) + h). Defaults to None, which takes floor(y).

        Returns:
            Quantized weight, of the shape and type of ``x``.
        """
        k, offset = self.side_params()
        rounding = None if rounding is None else self._rows(rounding)
        y = _LogFakeQuantize.apply(
            self._rows(x), *self._columns(), k, offset, rounding, self._grid(), self.location != 'zero'
        )
        return y.reshape(x.shape).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor, rounding: Tensor | None = None) -> Tensor:
        """Integer codes, see ``table`` for their order.

        Args:
            x: Weight of shape (C, ...).
            rounding: Learned rounding; up where it is 1/2 or more. Defaults to None.

        Returns:
            Codes from 0 to 2^bits - 1, torch.int32.

        Raises:
            PTQError: If ``x`` is empty or holds NaN or infinity.
        """
        check_finite(x, 'tensor')
        grid, (mu, s) = self._grid(), self._columns()
        d = (self._rows(x) - mu) / unit_and_size(s)[0]
        if rounding is None:
            return grid.encode(d).reshape(x.shape)
        minus = log_grid.sign_bit(d)
        y = log_grid.psi(self.mode, d.abs(), *grid.side_params(minus))
        c = (torch.floor(y - 0.5) + (self._rows(rounding) >= 0.5)).clamp_(0, self.count - 1).to(torch.int32)
        return grid.code(minus, c).reshape(x.shape)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        mu, s = self._columns()
        rows = codes.to(torch.int32).reshape(self.s.numel(), -1)
        mu = None if self.location == 'zero' else mu
        return self._grid().value(rows, mu, unit_and_size(s)[1]).reshape(codes.shape)

    @torch.no_grad()
    def code_position(self, x: Tensor) -> Tensor:
        mu, s = self._columns()
        d = (self._rows(x) - mu) / unit_and_size(s)[0]
        y = log_grid.psi(self.mode, d.abs(), *self._grid().side_params(log_grid.sign_bit(d)))
        # the logarithm of 'exact' and 'shift' is infinite at 0
        return (y - 0.5).clamp(-1, self.count).reshape(x.shape)

    @torch.no_grad()
    def step_size(self) -> float:
        return float(self.step_sizes().mean())

    @torch.no_grad()
    def step_sizes(self) -> Tensor:
        return self.table_scale() * self.table().float().diff().median()

    @torch.no_grad()
    def inside_bin(self, codes: Tensor) -> Tensor:
        if self.mode != 'shift':
            return self.decode(codes)
        # the published grid decodes a code to a value outside its bin
        grid, (mu, s) = self._grid(), self._columns()
        rows = codes.reshape(self.s.numel(), -1)
        minus = (rows < self.count).to(torch.int32)
        middle = log_grid.inverse('exact', grid.magnitude_code(minus, rows) + 0.5, *grid.side_params(minus))
        return (mu + unit_and_size(s)[1] * (1 - 2 * minus) * middle).reshape(codes.shape)

    @torch.no_grad()
    def fit_weight(self, weight: Tensor, observer: Any = None, importance: Tensor | None = None) -> None:
        """Searches mu, s, k and eps (or a) for the least squared error.

        Args:
            weight: Weight of shape (C, ...).
            observer: Not used: a log-affine grid has no clipping range. Defaults to None.
            importance: Factor of the squared error, broadcastable to ``weight``. Defaults to None.

        Raises:
            PTQError: If the weight holds NaN or infinity, or a shape does not fit.
        """
        self.side_params()
        check_finite(weight, 'weight')
        matrix = self.as_matrix(weight)
        factor = self.importance_matrix(importance, weight)
        mu, s, k, offset = fit_log_affine(matrix, factor, self.mode, self.bits, self.requested_location, self.table_max)
        self._set_location('zero' if mu is None else 'median')
        if mu is not None:
            self.mu.copy_(mu.view(self.param_shape))
        self.s.copy_(s.view(self.param_shape))
        self.log_k.copy_(k.log())
        getattr(self, self._offset_name).copy_(offset.log() if self._offset_name == 'log_eps' else offset)
