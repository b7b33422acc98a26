"""Quantization ranges from histograms: percentiles, KL divergence, squared error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdet_ptq.quantizers.histogram import NUM_BINS, StreamingHistogram

# thresholds tried by the KL search, and ratios tried in a sweep of the squared-error search
_KL_CANDIDATES = 64
_COARSE = 0.9 ** torch.arange(45, dtype=torch.float64)
_FINE = torch.linspace(1.06, 0.94, 13)
# of many channels, so many bins are joined: the error is integrated over bins, and channels spread less than tensors
_JOINED = 4
# rows of a histogram evaluated at once: 2^19 elements, which stay in a processor's cache
_ROWS = 2**19 // NUM_BINS


def quantile_range(
    histogram: StreamingHistogram, low: Tensor, high: Tensor, share: float, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Ends that leave out ``1 - share`` of the elements on either side (symmetric: of the magnitudes).

    Args:
        histogram: Counts of C channels.
        low: Observed minimum, at most 0, of shape (C,).
        high: Observed maximum, at least 0, of shape (C,).
        share: Share of the elements below the upper end, between 0.5 and 1.
        symmetric: Whether magnitudes are counted.

    Returns:
        Ends of shape (C,), linear within a bin.
    """

    def quantile(counts: Tensor, first: Tensor, q: float) -> Tensor:
        total = counts.cumsum(1)
        target = total[:, -1:] * q
        index = (total < target).sum(1, keepdim=True).clamp_max(NUM_BINS - 1)
        count = counts.gather(1, index)
        part = (target - (total.gather(1, index) - count)) / count.clamp_min(1)
        return ((first[:, None] + index + part) * histogram.width[:, None]).squeeze(1)

    if symmetric:
        top = quantile(histogram.magnitudes(), torch.zeros_like(histogram.first), share)
        top = torch.minimum(top, torch.maximum(-low, high).double())
        return -top, top
    ends = [quantile(histogram.counts, histogram.first, q) for q in (1 - share, share)]
    return torch.maximum(ends[0].clamp_max(0), low.double()), torch.minimum(ends[1].clamp_min(0), high.double())


def kl_divergence(counts: Tensor, size: Tensor, levels: int) -> Tensor:
    """KL divergence between clipped counts and the same counts quantized to ``levels`` levels.

    Args:
        counts: Counts of magnitudes of shape (C, NUM_BINS).
        size: Bins that are kept, int64 of shape (C,); what lies beyond joins the last of them.
        levels: Levels that share the kept bins.

    Returns:
        Divergence in nats, of shape (C,).
    """
    index = torch.arange(counts.shape[1], device=counts.device)
    size = size[:, None]
    kept = torch.where(index < size, counts, 0)
    beyond = (counts - kept).sum(1, keepdim=True)
    reference = torch.where(index == size - 1, kept + beyond, kept)
    group = (index * levels // size).clamp_max(levels - 1)
    empty = counts.new_zeros(len(counts), levels)
    sums = empty.scatter_add(1, group, kept)
    occupied = empty.scatter_add(1, group, (kept > 0).to(counts.dtype))
    spread = torch.where(kept > 0, (sums / occupied.clamp_min(1)).gather(1, group), 0)
    p = reference / reference.sum(1, keepdim=True).clamp_min(1)
    q = spread / spread.sum(1, keepdim=True).clamp_min(1)
    # clipped elements that fall on an empty bin cost much, but not infinitely much
    return torch.where(p > 0, p * (p.clamp_min(1e-30) / q.clamp_min(1e-10)).log(), 0).sum(1)


def kl_threshold(histogram: StreamingHistogram, signed_levels: int, unsigned_levels: int, negative: Tensor) -> Tensor:
    """The magnitude to clip at, float64 of shape (C,): infinite where nothing should be clipped.

    Args:
        histogram: Counts of C channels.
        signed_levels: Levels for magnitudes in channels that hold negative values.
        unsigned_levels: Levels for magnitudes in the others.
        negative: Which channels hold negative values, of shape (C,).
    """
    magnitudes, width = histogram.magnitudes(), histogram.width
    # zero has a code of its own: a ReLU's spike there must not decide the clipping
    magnitudes[:, 0] = magnitudes[:, 1]
    threshold = torch.full_like(width, math.inf)
    for levels, rows in ((signed_levels, negative), (unsigned_levels, ~negative)):
        for part in rows.nonzero().squeeze(1).split(_ROWS):
            counts = magnitudes[part]
            used = torch.where(counts > 0, torch.arange(1, NUM_BINS + 1, device=counts.device), 0).amax(1)
            # as many bins as levels: nothing to choose
            best = torch.where(used <= levels, -math.inf, math.inf).to(width)
            found = torch.full_like(best, math.inf)
            for share in torch.linspace(1, 0, _KL_CANDIDATES).tolist():
                size = levels + ((used - levels) * share).round().long().clamp_min(0)
                divergence = kl_divergence(counts, size, levels)
                better = divergence < best
                best = torch.where(better, divergence, best)
                found = torch.where(better, math.inf if share == 1 else size * width[part], found)
            threshold[part] = found
    return threshold


def _squared_error(
    edges: Tensor,
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    symmetric: bool,
    within: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Squared error of each row of a histogram, quantized with each pair of ends of shape (R, C).

    Values are spread evenly within their bin, and the error is integrated over it: steps may be narrower than bins,
    as they are where a few outliers widen the observed range. With r the distance of x to its level k s, the integral
    from zero to x is k s^3 / 12 + r^3 / 3, beyond the last level, too.

    Args:
        edges: Bin edges, float64 of shape (C, B + 1).
        counts: Counts divided by the bin width, of shape (C, B).
        low: Lower ends.
        high: Upper ends.
        bits: Bits of the codes.
        symmetric: Whether codes are signed.
        within: The edges, of shape (R, C), beyond which bins count nothing. Defaults to None: all count.
    """
    if symmetric:
        last = 2 ** (bits - 1) - 1
        first, scale = -last - 1, high / last
        zero = torch.zeros_like(scale)
    else:
        first, last = 0, 2**bits - 1
        scale = (high - low) / last
        zero = (-low / scale.clamp_min(1e-30)).round()
    scale, zero = scale.clamp_min(1e-30)[..., None], zero[..., None]
    steps = edges / scale
    if within is not None:
        # a bin between equal edges has no error
        steps.clamp_(*(end[..., None] / scale for end in within))
    level = steps.round().add_(zero).clamp_(first, last).sub_(zero)
    rest = steps.sub_(level)
    integral = rest.pow_(3).div_(3).add_(level.div_(12))
    return (integral.diff(dim=-1).mul_(counts).sum(-1, keepdim=True) * scale**3).squeeze(-1)


class _Clipping:
    """What values lose that lie beyond an end, where the histogram counts them by what matters.

    A value that is clipped moves through all values up to the end. How much that changes is the sum of their
    sensitivities, not its own alone: far below zero SiLU is flat, and a value moved from there to where it is not does
    change. The sensitivity at a value is the root of the mean weight of the values like it.

    Args:
        weights: What the values of each bin matter, of shape (C, B).
        counts: How many they are, of the same shape.
        edges: The bins' edges, of shape (C, B + 1).
    """

    def __init__(self, weights: Tensor, counts: Tensor, edges: Tensor) -> None:
        self.edges, self.centers = edges, (edges[:, 1:] + edges[:, :-1]) / 2
        slope = torch.where(counts > 0, (weights / counts.clamp_min(1e-30)).sqrt(), 0)
        # values are moved through empty bins, too, to which they are as sensitive as they were where they were
        last = counts.shape[1] - 1
        index = torch.arange(last + 1, device=counts.device).expand_as(counts)
        below = torch.where(counts > 0, index, 0).cummax(1).values
        above = torch.where(counts > 0, index, last).flip(1).cummin(1).values.flip(1)
        slope = slope.gather(1, torch.where(self.centers < 0, below, above))
        self.effect = (slope * edges.diff(dim=1)).cumsum(1)
        # sums over all bins up to one, and from one on: of the counts, and times the first two powers of the effect
        powers = torch.stack([counts, counts * self.effect, counts * self.effect.square()])
        self.below, self.above = powers.cumsum(2), powers.flip(2).cumsum(2).flip(2)

    def loss(self, low: Tensor, high: Tensor) -> Tensor:
        """Expected squared change by the values outside of the ends of shape (R, C)."""
        total = torch.zeros_like(low)
        for end, sums in ((low, self.below), (high, self.above)):
            place = self._first(end)
            effect = self.effect.gather(1, place)
            count, first, second = (power.gather(1, place) for power in sums)
            total += (second - 2 * effect * first + effect.square() * count).clamp_(min=0).T
        return total

    def within(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Edges of the bins whose centers lie between the ends, of shape (R, C) each."""
        return self.edges.gather(1, self._first(low)).T, self.edges.gather(1, self._last(high) + 1).T

    def _first(self, end: Tensor) -> Tensor:
        """The first bin whose center is not below the end, of shape (C, R)."""
        return torch.searchsorted(self.centers, end.T.contiguous()).clamp_max(self.centers.shape[1] - 1)

    def _last(self, end: Tensor) -> Tensor:
        """The last bin whose center is not above the end, of shape (C, R)."""
        return torch.searchsorted(self.centers, end.T.contiguous(), right=True).sub_(1).clamp_(min=0)


def mse_range(
    histogram: StreamingHistogram,
    low: Tensor,
    high: Tensor,
    bits: int,
    symmetric: bool,
    plain: StreamingHistogram | None = None,
    together: float = 1,
) -> tuple[Tensor, Tensor]:
    """Ends with the least squared quantization error, found by coordinate descent on clip ratios.

    Args:
        histogram: Counts of C channels.
        low: Observed minimum, at most 0, of shape (C,).
        high: Observed maximum, at least 0, of shape (C,).
        bits: Bits of the codes.
        symmetric: Whether both ends are the same, and codes signed.
        plain: The number of the values, where the histogram counts them by what matters. Defaults to None: all matter
            alike.
        together: How many values are clipped at once, all the same way: errors of rounding cancel out, these do not.
            Defaults to 1.

    Returns:
        Ends of shape (C,), within the observed ones (symmetric: within the larger of them).
    """
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    if 2**bits > NUM_BINS // 2:
        return low, high
    both, lower, upper = (1, 1), (1, 0), (0, 1)
    order = [(_COARSE, both), (_FINE, both)]
    if not symmetric and bool((low < 0).any()):
        # behind a SiLU the lower end is small and full of values: it must not shrink with the upper one
        order = [(_COARSE, end) for end in (upper, both, lower, upper)] + [(_FINE, end) for end in (both, upper, lower)]
    found = []
    for rows in torch.arange(len(low), device=low.device).split(_ROWS):
        edges, counts = histogram.edges()[rows], histogram.spread()[rows]
        if len(low) > 1:
            edges, counts = edges[:, ::_JOINED], counts.unflatten(1, (-1, _JOINED)).mean(2)
        clipping = None
        if plain is not None:
            pair = [h.counts[rows].unflatten(1, (-1, NUM_BINS // counts.shape[1])).sum(2) for h in (histogram, plain)]
            clipping = _Clipping(*pair, edges)

        def error_of(trial: Tensor, edges=edges, counts=counts, clipping=clipping) -> Tensor:
            if clipping is None:
                return _squared_error(edges, counts, *trial, bits, symmetric)
            inside = _squared_error(edges, counts, *trial, bits, symmetric, clipping.within(*trial))
            return inside + together * clipping.loss(*trial)

        full = torch.stack([low[rows], high[rows]])
        ends, best = full, error_of(full[:, None])[0]
        for ratios, (move_low, move_high) in order:
            # a coarse ratio is one of the full range, a fine one of the best so far
            start, moving = ends, full if ratios is _COARSE else ends
            for part in ratios.to(full).split(max(1, _ROWS // len(rows))):
                moved, still = moving[:, None] * part[:, None], start[:, None].expand(-1, len(part), -1)
                trial = torch.stack([(moved if move_low else still)[0], (moved if move_high else still)[1]])
                trial = torch.maximum(torch.minimum(trial, full[1]), full[0])
                error, index = error_of(trial).min(0)
                better = error < best
                chosen = trial.gather(1, index.expand(2, 1, -1)).squeeze(1)
                best, ends = torch.where(better, error, best), torch.where(better, chosen, ends)
        found.append(ends)
    low, high = torch.cat(found, 1)
    return low, high
