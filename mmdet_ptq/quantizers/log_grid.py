"""The arithmetic of log-affine grids: psi, its inverse, bin edges, the int8 table and the search for k and eps.

A side is one half of the number line around the location: index 0 holds d >= 0, index 1 holds d < 0. Each has a slope
``k`` and an offset, which is ``eps`` in mode 'log1p' and ``a`` in modes 'exact' and 'shift'. All magnitudes are in
units of the channel's scale. Everything that decides a bin or a table entry is computed in float64, so that it does not
depend on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# least-error (eps, ln 2 / k) on ideal Laplace and Gaussian weights, from 5 bits on for both at once
_INITIAL = {
    2: (2.2, 0.51),
    3: (1.6, 0.37),
    4: (1.24, 0.236),
    5: (1.02, 0.131),
    6: (0.905, 0.0729),
    7: (0.811, 0.0396),
    8: (0.767, 0.0205),
}
_LN2 = 0.6931471805599453
TABLE_MAX = 127
# log-spaced bins for the search of k and eps: 64 an octave over 2^-20 .. 2^20
_BINS_PER_OCTAVE, _OCTAVES = 64, 20


def psi(mode: str, magnitude: Tensor, k: Tensor, offset: Tensor) -> Tensor:
    """Y = k log2(1 + |d| / eps) in mode 'log1p', y = k log2 |d| + a in modes 'exact' and 'shift'."""
    if mode == 'log1p':
        # log1p keeps the digits of small magnitudes
        return torch.log1p(magnitude / offset) * (k / _LN2)
    return torch.log2(magnitude) * k + offset


def inverse(mode: str, y: Tensor, k: Tensor, offset: Tensor) -> Tensor:
    """The magnitude that ``y`` is decoded to; mode 'shift' leaves k out, as published."""
    if mode == 'log1p':
        return torch.expm1(y * (_LN2 / k)) * offset
    return torch.exp2((y - offset) / k) if mode == 'exact' else torch.exp2(y - offset)


def slope(mode: str, decoded: Tensor, k: Tensor, offset: Tensor) -> Tensor:
    """Derivative of ``inverse`` with respect to y, told by the decoded magnitude."""
    if mode == 'log1p':
        return (decoded + offset) * (_LN2 / k)
    return decoded * (_LN2 / k) if mode == 'exact' else decoded * _LN2


def levels(mode: str, k: Tensor, offset: Tensor, count: int) -> Tensor:
    """Decoded magnitudes of the codes 0 .. count - 1, float64 of shape (2, count)."""
    middle = torch.arange(count, dtype=torch.float64, device=k.device) + 0.5
    return inverse(mode, middle, k.double()[:, None], offset.double()[:, None])


def edges(mode: str, k: Tensor, offset: Tensor, level: Tensor) -> Tensor:
    """Lower edges of the bins of the codes 1 .. count - 1.

    Where the rounding of the table has moved a level out of its bin (above 4 bits, where neighbours share an entry, and
    near zero in mode 'exact'), the edge gives way, so that every level of the table quantizes to itself. Mode 'shift'
    does not invert psi: its bins stay as published.

    Args:
        mode: 'log1p', 'exact' or 'shift'.
        k: Slopes of shape (2,).
        offset: Offsets of shape (2,).
        level: Magnitudes as in the rounded table, float64 of shape (2, count).

    Returns:
        Float32 of shape (2, count - 1).
    """
    y = torch.arange(1, level.shape[1], dtype=torch.float64, device=k.device)
    # psi, and not the decoder, decides the bin: in mode 'shift' the two differ
    edge = inverse('exact' if mode == 'shift' else mode, y, k.double()[:, None], offset.double()[:, None])
    if mode != 'shift':
        below, gap = level[:, :-1], level.diff(dim=1)
        # a quarter of the gap is far more than float32 rounding takes
        edge = edge.clamp(below + gap / 4, below + 3 * gap / 4)
    return edge.float()


def int8_table(level: Tensor, table_max: int = TABLE_MAX) -> tuple[Tensor, Tensor]:
    """Rounds the levels to one int8 table.

    Args:
        level: Magnitudes of shape (2, count).
        table_max: What the largest becomes. Defaults to 127.

    Returns:
        The table of 2 * count entries in ascending order (negative side first, largest
        magnitude first), int8; and its step, float32 of shape ().
    """
    step = level.max() / table_max
    plus, minus = (level / step).round().to(torch.int8).unbind(0)
    return torch.cat([-minus.flip(0), plus]), step.float()


class Grid:
    """One layer's grid: bin edges and int8 table of both sides.

    A code is the index into the ascending table: code ``count + c`` is magnitude ``c`` at or above the location, code
    ``count - 1 - c`` is magnitude ``c`` below it. The top bit is thus the sign (1 = not negative), and codes are
    monotone in the weight.

    Args:
        mode: 'log1p', 'exact' or 'shift'.
        count: Magnitudes per side, 2^(bits - 1).
        k: Slopes of shape (2,).
        offset: Offsets of shape (2,).
        table_max: The largest integer of the table. Defaults to 127.
    """

    def __init__(self, mode: str, count: int, k: Tensor, offset: Tensor, table_max: int = TABLE_MAX) -> None:
        self.mode, self.count, self.table_max = mode, count, table_max
        self.k, self.offset = k.detach().clone(), offset.detach().clone()
        level = levels(mode, self.k, self.offset, count)
        self.table, self.step = int8_table(level, table_max)
        if mode == 'shift':
            # half a step is no level: the least two are the same
            least = torch.ones_like(self.table)
            least[:count] = -1
            self.table = torch.where(self.table == 0, least, self.table)
        entries = torch.stack([self.table[count:], -self.table[:count].flip(0)])
        plus, minus = edges(mode, self.k, self.offset, entries.double() * (level.max() / table_max))
        # a magnitude on an edge belongs to the bin above it, on the negative side too
        minus = torch.nextafter(-minus.flip(0), minus.new_tensor(torch.inf))
        self.bounds = torch.cat([minus, minus.new_zeros(1), plus])
        self._entries = self.table.float()

    def is_of(self, k: Tensor, offset: Tensor) -> bool:
        """Whether the grid is that of a slope and an offset, on their device."""
        return self.k.device == k.device and torch.equal(self.k, k) and torch.equal(self.offset, offset)

    def side_params(self, minus: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset of every element's side (``minus``: 1 below the location, else 0)."""
        return _look_up(self.k, minus), _look_up(self.offset, minus)

    def encode(self, d: Tensor) -> Tensor:
        """Index into the table of normalized weights: floor(y) on their side, within the codes; int32."""
        return torch.bucketize(d, self.bounds, out_int32=True, right=True)

    def code(self, minus: Tensor, c: Tensor) -> Tensor:
        """Index into the table of magnitude code ``c``: count + c, or count - 1 - c below the location."""
        return (c ^ -minus) + self.count

    def magnitude_code(self, minus: Tensor, code: Tensor) -> Tensor:
        """The magnitude code ``c`` of an index into the table, the inverse of ``code``."""
        return (code - self.count) ^ -minus

    def integer_levels(self, mu: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """What the table's entries mean beyond a location: integers, and what one of them is worth.

        mu + size * level lies on no grid through zero, which is all that integer kernels know. Rounded to
        2 * table_max + 1 steps a channel it does, for 0.4 % of the channel's largest weight at most (0.8 % with 64).

        Args:
            mu: Locations of shape (C, 1).
            size: Scales of shape (C, 1).

        Returns:
            Integers from -table_max to table_max of shape (C, 2 * count), and the scale of shape
            (C, 1); both float32.
        """
        level = mu + size * self.step * self._entries
        scale = level.abs().amax(1, keepdim=True) / self.table_max
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return (level / scale).round_(), scale

    def value(self, code: Tensor, mu: Tensor | None, size: Tensor) -> Tensor:
        """(size * step) * table[code], or with a location see ``integer_levels``: here alone codes become values.

        Args:
            code: Indices into the table, of shape (C, K).
            mu: Locations of shape (C, 1); None where the location is zero.
            size: Scales of shape (C, 1).
        """
        if mu is None:
            return _look_up(self._entries, code).mul_(size * self.step)
        integers, scale = self.integer_levels(mu, size)
        row = torch.arange(len(code), dtype=torch.int32, device=code.device)[:, None] * integers.shape[1]
        return _look_up((integers * scale).flatten(), code + row)


def sign_bit(d: Tensor) -> Tensor:
    """1 below the location, else 0; int32."""
    return (d < 0).to(torch.int32)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    # ten times as fast as table[index] on a CPU
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def initial_side(mode: str, bits: int) -> tuple[float, float]:
    """Slope and offset to start the search from; for 'exact' and 'shift' the top level is 4 mean magnitudes."""
    if mode == 'log1p':
        eps, width = _INITIAL[bits]
        return _LN2 / width, eps
    count = 2 ** (bits - 1)
    k = 1.0 if mode == 'shift' else count / (bits + 1)
    return k, count - 0.5 - 2 * (k if mode == 'exact' else 1)


def side_histogram(d: Tensor, weight: Tensor) -> Tensor:
    """Weight, and weight times magnitude, of log-spaced bins of both sides.

    Args:
        d: Normalized weights.
        weight: Factor of the squared error, of the same shape.

    Returns:
        Float64 of shape (2 sums, 2 sides, bins).
    """
    bins = 2 * _OCTAVES * _BINS_PER_OCTAVE
    magnitude = d.abs()
    index = (torch.log2(magnitude) + _OCTAVES).mul_(_BINS_PER_OCTAVE).clamp_(0, bins - 1).to(torch.int32)
    index = (index + sign_bit(d) * bins).flatten()
    sums = [torch.bincount(index, w.flatten().double(), 2 * bins) for w in (weight, weight * magnitude)]
    return torch.stack(sums).view(2, 2, bins)


def refine_side(
    mode: str, magnitude: Tensor, weight: Tensor, k: float, offset: float, count: int, width: float
) -> tuple[float, float]:
    """The best slope and offset on a grid around the given ones, by weighted squared error.

    The grid runs over the top level and, with the top level held, over eps ('log1p') or k ('exact', 'shift').
    """
    if magnitude.numel() == 0:
        return k, offset
    shape = torch.exp(torch.linspace(-width, width, 13, dtype=torch.float64, device=magnitude.device))
    old_k, old_offset = shape.new_tensor(k), shape.new_tensor(offset)
    top, shape = torch.meshgrid(
        inverse(mode, shape.new_tensor(count - 0.5), old_k, old_offset) * shape, shape, indexing='ij'
    )
    top, shape = top.reshape(-1, 1), shape.reshape(-1, 1)
    if mode == 'log1p':
        offsets = shape * offset
        ks = (count - 0.5) * _LN2 / torch.log1p(top / offsets)
    else:
        ks = shape * k
        offsets = count - 0.5 - torch.log2(top) * (ks if mode == 'exact' else 1)
    y = psi(mode, magnitude, ks, offsets).floor_().clamp_(0, count - 1) + 0.5
    error = ((inverse(mode, y, ks, offsets) - magnitude).square() * weight).sum(1)
    best = int(error.argmin())
    return float(ks[best]), float(offsets[best])
