"""Initial values of log-affine quantizers: method of moments, then a search for the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdet_ptq.quantizers import log_grid

# a location is kept in `location='auto'` if it takes off more than this share of the squared error
_LOCATION_GAIN = 0.02
# above this, levels around a location are finer than the int8 grid that they are rounded to
_LOCATION_BITS = 4
# rows are compared in blocks of about this many elements: bounds the memory and stays in a CPU's cache
_BLOCK = 2**18
# half-widths (in log) of the grids for k and eps, and the factors tried on every channel's scale, round by round
_ROUNDS = (
    (0.7, torch.exp(torch.linspace(-0.5, 0.5, 9)).tolist()),
    (0.25, (0.9, 0.95, 1.05, 1.1)),
    (0.08, (0.97, 1.03)),
)


class _Problem:
    """A weight around a fixed location: errors and statistics, computed in blocks of rows."""

    def __init__(
        self, matrix: Tensor, factor: Tensor | None, mu: Tensor, mode: str, count: int, table_max: int
    ) -> None:
        self.matrix, self.factor, self.mu, self.mode, self.count = matrix, factor, mu, mode, count
        self.table_max = table_max
        rows = max(1, _BLOCK // matrix.shape[1])
        self.blocks = [slice(i, i + rows) for i in range(0, len(matrix), rows)]

    def grid(self, k: Tensor, offset: Tensor) -> log_grid.Grid:
        return log_grid.Grid(self.mode, self.count, k.float(), offset.float(), self.table_max)

    def _block(self, rows: slice) -> tuple[Tensor, Tensor | float]:
        return self.matrix[rows] - self.mu[rows, None], 1.0 if self.factor is None else self.factor[rows]

    def scale(self) -> Tensor:
        """Mean magnitude of each channel; exactly 0 where a channel holds a single value."""
        return torch.cat([self._block(rows)[0].abs().mean(1) for rows in self.blocks])

    def compare(self, grid: log_grid.Grid, s: Tensor) -> tuple[Tensor, Tensor]:
        """Each channel's squared error, and the scale that fits the chosen table entries best."""
        errors, scales = [], []
        for rows in self.blocks:
            centred, factor = self._block(rows)
            size = s[rows, None]
            d = centred / torch.where(size == 0, 1, size)
            code = grid.encode(d)
            level = grid.value(code, None, torch.ones_like(size))
            errors.append((factor * (size * level - centred).square()).sum(1))
            power = (factor * level.square()).sum(1)
            fitted = (factor * level * centred).sum(1) / power
            scales.append(torch.where((fitted > 0) & torch.isfinite(fitted) & (s[rows] > 0), fitted, s[rows]))
        return torch.cat(errors), torch.cat(scales)

    def side_histograms(self, s: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean magnitude and weight of the occupied log-spaced bins of both sides."""
        sums = 0.0
        for rows in self.blocks:
            centred, factor = self._block(rows)
            size = s[rows, None]
            weight = (size.square() * factor).expand_as(centred)
            sums = sums + log_grid.side_histogram(centred / torch.where(size == 0, 1, size), weight)
        return [(total[weight > 0] / weight[weight > 0], weight[weight > 0]) for weight, total in sums.unbind(1)]


def _search(problem: _Problem, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least error of each channel, scales, k and offsets."""
    mode, count = problem.mode, problem.count
    k0, offset0 = log_grid.initial_side(mode, bits)
    k = torch.full((2,), k0, dtype=torch.float64, device=problem.matrix.device)
    offset = torch.full_like(k, offset0)
    s = problem.scale()
    error, fitted = problem.compare(problem.grid(k, offset), s)
    best = error, s, k, offset
    for width, ratios in _ROUNDS:
        sides = [
            log_grid.refine_side(mode, m, w, float(k[i]), float(offset[i]), count, width)
            for i, (m, w) in enumerate(problem.side_histograms(s))
        ]
        k, offset = k.new_tensor([side[0] for side in sides]), k.new_tensor([side[1] for side in sides])
        grid = problem.grid(k, offset)
        start, (error, fitted) = s, problem.compare(grid, s)
        for ratio in (*ratios, None, None):
            # None stands for the least-squares scale of the codes chosen last
            trial = fitted if ratio is None else start * ratio
            trial_error, trial_fitted = problem.compare(grid, trial)
            better = trial_error < error
            error, s, fitted = (
                torch.where(better, new, old) for new, old in ((trial_error, error), (trial, s), (trial_fitted, fitted))
            )
        if error.sum() < best[0].sum():
            best = error, s, k, offset
    return best


def fit_log_affine(
    matrix: Tensor, factor: Tensor | None, mode: str, bits: int, location: str, table_max: int = log_grid.TABLE_MAX
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Finds the parameters with the least (weighted) squared error.

    Args:
        matrix: Weight of shape (C, K), float32.
        factor: Factor of the squared error, of the same shape.
        mode: 'log1p', 'exact' or 'shift'.
        bits: Bits of a code.
        location: 'auto' (up to 4 bits the better one, beyond that 'zero'), 'zero' or 'median'.
        table_max: The largest integer of the table. Defaults to 127.

    Returns:
        tuple: mu of shape (C,) or None where it stays at zero; s of shape (C,); k and the offsets, of shape (2,).
    """
    found = {}
    count = 2 ** (bits - 1)
    if location == 'auto' and bits > _LOCATION_BITS:
        location = 'zero'
    zero = torch.zeros(len(matrix), device=matrix.device)
    for name, mu in (('zero', lambda: zero), ('median', lambda: matrix.median(1).values)):
        if location in ('auto', name):
            place = mu()
            found[name] = (place, *_search(_Problem(matrix, factor, place, mode, count, table_max), bits))
    name = location
    if location == 'auto':
        name = 'median' if found['median'][1].sum() < (1 - _LOCATION_GAIN) * found['zero'][1].sum() else 'zero'
    mu, _, s, k, offset = found[name]
    return None if name == 'zero' else mu, s, k.float(), offset.float()
