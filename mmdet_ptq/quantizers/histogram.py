"""A streaming histogram per channel whose range grows by doubling, so that no count is ever split."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

NUM_BINS = 2048
# narrowest bin, 2^-40: what is smaller counts as zero
_LEAST_EXPONENT = -40


def _needed_exponent(low: Tensor, high: Tensor) -> Tensor:
    """The least e for which bins of width 2^e from low to high (zero included) number at most NUM_BINS."""
    _, exponent = torch.frexp(((high - low) / NUM_BINS).clamp_min(2.0**_LEAST_EXPONENT))
    exponent = exponent.long()
    for _ in range(2):
        width = torch.exp2(exponent.double())
        exponent = exponent + (torch.floor(high / width) - torch.floor(low / width) >= NUM_BINS)
    return exponent


class StreamingHistogram:
    """Counts in NUM_BINS bins a channel; bin i of the absolute grid is [i * 2^e, (i + 1) * 2^e).

    The edges are multiples of the bin width and the width is a power of two, so that a coarser grid joins whole bins:
    growing the range is exact. The range always contains zero.

    Args:
        channels: Number of histograms.
        device: Where the counts live. Defaults to 'cpu'.
        weighted: Whether it adds up weights of the values, too. Defaults to False.
    """

    def __init__(self, channels: int, device: torch.device | str = 'cpu', weighted: bool = False) -> None:
        self.exponent = torch.full((channels,), _LEAST_EXPONENT, dtype=torch.long, device=device)
        # absolute index of the first bin
        self.first = torch.zeros(channels, dtype=torch.long, device=device)
        self.counts = torch.zeros(channels, NUM_BINS, dtype=torch.float64, device=device)
        # how many of the counted values are exactly zero, as behind a ReLU
        self.zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        # the same two, each value counted by its weight
        self.weights = torch.zeros_like(self.counts) if weighted else None
        self.zero_weights = torch.zeros_like(self.zeros) if weighted else None
        # the covered range
        self.low = torch.zeros(channels, dtype=torch.float64, device=device)
        self.high = torch.zeros_like(self.low)

    @property
    def width(self) -> Tensor:
        """Bin widths, float64 of shape (C,)."""
        return torch.exp2(self.exponent.double())

    def absolute_index(self) -> Tensor:
        """Index of every bin on the grid that starts at zero, int64 of shape (C, NUM_BINS)."""
        return self.first[:, None] + torch.arange(NUM_BINS, device=self.first.device)

    def centers(self) -> Tensor:
        """Bin centers, float64 of shape (C, NUM_BINS); the bin that starts at zero is represented by zero."""
        index = self.absolute_index()
        return torch.where(index == 0, 0, (index + 0.5) * self.width[:, None])

    def edges(self) -> Tensor:
        """Bin edges, float64 of shape (C, NUM_BINS + 1)."""
        index = torch.arange(NUM_BINS + 1, device=self.first.device)
        return (self.first[:, None] + index) * self.width[:, None]

    def spread(self) -> Tensor:
        """Counts of values other than zero, per unit of the values, float64 of shape (C, NUM_BINS)."""
        counts = torch.where(self.absolute_index() == 0, self.counts - self.zeros[:, None], self.counts)
        return counts / self.width[:, None]

    def by_weight(self) -> StreamingHistogram:
        """The same with weights for counts."""
        found = copy.copy(self)
        found.counts, found.zeros = self.weights, self.zero_weights
        return found

    def _grow(self, low: Tensor, high: Tensor) -> None:
        """Makes the bins cover [low, high] of shape (C,) as well."""
        if bool(((low >= self.low) & (high <= self.high)).all()):
            return
        self.low, self.high = torch.minimum(self.low, low.double()), torch.maximum(self.high, high.double())
        width = self.width
        if bool(((self.low >= self.first * width) & (self.high < (self.first + NUM_BINS) * width)).all()):
            return
        new = torch.maximum(self.exponent, _needed_exponent(self.low, self.high))
        width = torch.exp2(new.double())
        first, last = (torch.floor(end / width).long() for end in (self.low, self.high))
        (grown,) = torch.where((new != self.exponent) | (first < self.first) | (last >= self.first + NUM_BINS))
        if not len(grown):
            return
        new, first = new[grown], first[grown]
        index = self.first[grown, None] + torch.arange(NUM_BINS, device=first.device)
        # bins outside the covered range hold nothing, wherever they are clamped to
        moved = ((index >> (new - self.exponent[grown]).clamp_max(62)[:, None]) - first[:, None]).clamp_(
            0, NUM_BINS - 1
        )
        for counts in (self.counts, self.weights):
            if counts is not None:
                held = counts[grown]
                counts[grown] = torch.zeros_like(held).scatter_add_(1, moved, held)
        self.exponent[grown], self.first[grown] = new, first

    def add(self, samples: Tensor, low: Tensor, high: Tensor, weights: Tensor | None = None) -> None:
        """Counts samples of shape (C, n) that lie within [low, high] of shape (C,), and adds up their weights."""
        self._grow(low, high)
        # the width is a power of two: the quotient is exact in the samples' own type
        index = (samples / self.width.to(samples)[:, None]).floor_().long().sub_(self.first[:, None])
        index.clamp_(0, NUM_BINS - 1).add_(torch.arange(len(index), device=index.device)[:, None] * NUM_BINS)
        index = index.flatten()
        # a table of sums as large as the counts would cost more than the samples, where channels are many
        self.counts.view(-1).scatter_add_(0, index, self.counts.new_ones(()).expand_as(index))
        if weights is not None:
            self.weights.view(-1).scatter_add_(0, index, weights.double().flatten())
        zero = samples == 0
        if bool(zero.any()):
            self.zeros += zero.sum(1)
            if weights is not None:
                self.zero_weights += torch.where(zero, weights, 0).sum(1, dtype=torch.float64)

    def magnitudes(self) -> Tensor:
        """Counts of |x| in NUM_BINS bins from zero, float64 of shape (C, NUM_BINS)."""
        index = self.absolute_index()
        folded = torch.where(index < 0, -index - 1, index).clamp_max(NUM_BINS - 1)
        return torch.zeros_like(self.counts).scatter_add_(1, folded, self.counts)
