"""Weights whose sums of two products fit 16 bits, so that integer kernels are exact on processors without VNNI, too.

There x86 multiplies by ``VPMADDUBSW``: unsigned bytes of an activation times signed bytes of a weight, each two
neighbouring products added in 16 bits, which saturate. 255 * (|a| + |b|) fits if the magnitudes of the two weights add
up to at most :data:`SUM_LIMIT`, or if their signs differ. Which weights are neighbours was measured kernel by kernel
(docs/runtimes/processors.md): those of an output channel follow each other as the image lies in memory,
its channels together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# 255 * 128 = 32640 is within 16 bits, 255 * 129 is not; nor is -255 * 129
SUM_LIMIT = 128


class Neighbours(nn.Module):
    """Which weights of an output channel are multiplied side by side.

    Rows are an output channel's weights, (channels, *kernel) flattened.

    - Kernels of ONNX Runtime read position by position, all channels of each: neighbours are the first and the second
      weight in this order, the third and the fourth, and so on.
    - Those of oneDNN (OpenVINO) fill up an odd number of channels at each position.
    - With one channel, or slices of one, the order depends on the kernel and the image: each two are neighbours.

    Where the number of channels is even, the first two are the same.

    Args:
        channels: Input channels of an output channel.
        kernel: Size of the kernel; empty for a linear layer. Defaults to ().
        slices: Into how many slices of an image the channels fall, whose order an export may change: space to depth
            has its own. The channels of a slice stay together. Defaults to 1.
    """

    def __init__(self, channels: int, kernel: Sequence[int] = (), slices: int = 1) -> None:
        super().__init__()
        self.channels, self.kernel, self.slices = int(channels), tuple(map(int, kernel)), int(slices)
        place = torch.arange(self.channels * _product(self.kernel)).view(self.channels, *self.kernel)
        self.size = place.numel()
        order = place.movedim(0, -1).flatten()
        pairings = [torch.stack([order[: len(order) // 2 * 2 : 2], order[1::2]])]
        if self.channels == self.slices:
            pairings += [order[torch.tensor(pairs).T] for pairs in _round_robin(self.size) if pairs]
        elif self.slices > 1 or self.channels % 2:
            rounds = _rounds(_in_order(self.channels) if self.slices == 1 else _in_slices(self.channels, self.slices))
            pairings += [place[torch.tensor(pairs).T].reshape(2, -1) for pairs in rounds]
        # each pair once: two orders often begin alike
        seen: set[tuple[int, int]] = set()
        for number, pairing in enumerate(pairings):
            new = [pair for pair in map(tuple, pairing.sort(0).values.T.tolist()) if pair not in seen]
            seen.update(new)
            self.register_buffer(
                f'pairing_{number}', torch.tensor(new, dtype=torch.int64).reshape(-1, 2).T, persistent=False
            )
        self._count = len(pairings)

    def spec(self) -> dict[str, Any]:
        """Plain arguments from which the same is built."""
        return dict(channels=self.channels, kernel=list(self.kernel), slices=self.slices)

    def pairings(self) -> list[Tensor]:
        """Disjoint pairs of places in a row, a tensor (2, P) each; together they are all the pairs."""
        found = [getattr(self, f'pairing_{number}') for number in range(self._count)]
        return [pairing for pairing in found if pairing.numel()]

    def partners(self) -> Tensor:
        """Of each place in a row its neighbours, (N, K), int64; -1 where there are fewer than N."""
        rows = []
        for first, second in self.pairings():
            row = torch.full((self.size,), -1, dtype=torch.int64, device=first.device)
            row[first], row[second] = second, first
            rows.append(row)
        return torch.stack(rows) if rows else torch.empty(0, self.size, dtype=torch.int64)

    def largest_sum(self, levels: Tensor) -> Tensor:
        """The largest sum of magnitudes of two neighbours of the same sign in each row.

        Args:
            levels: Weights in units of their scale, (C, K).

        Returns:
            Shape (C,); 0 where no two neighbours have the same sign.
        """
        found = levels.new_zeros(len(levels))
        for first, second in self.pairings():
            a, b = levels.index_select(1, first), levels.index_select(1, second)
            found = torch.maximum(found, torch.where(a * b > 0, (a + b).abs(), 0).amax(1))
        return found

    def bound(self, levels: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The nearest levels of which no two neighbours exceed the limit together.

        Magnitudes only fall, so that a pair, once within the limit, stays there.

        Args:
            levels: Integers, or relaxed ones, (C, K).
            position: What they are rounded from: a pair goes to the levels on the limit that are nearest to it.
                Defaults to None: the levels themselves.

        Returns:
            The levels, and which of them changed; None for the latter where all were within the limit.
        """
        changed = None
        for first, second in self.pairings():
            total = levels.index_select(1, first) + levels.index_select(1, second)
            row, pair = (total.abs() > SUM_LIMIT).nonzero(as_tuple=True)
            # far from zero, as with a zero point, different signs may exceed it, too
            same = levels[row, first[pair]] * levels[row, second[pair]] > 0
            row, pair = row[same], pair[same]
            if not len(row):
                continue
            if changed is None:
                levels, changed = levels.clone(), torch.zeros_like(levels, dtype=torch.bool)
                position = levels if position is None else position.clone()
            places = first[pair], second[pair]
            a, b = (levels[row, place] for place in places)
            x, y = (position[row, place].abs() for place in places)
            kept = ((SUM_LIMIT + x - y) / 2).clamp_(0, SUM_LIMIT)
            # relaxed levels that are integers stay integers
            kept = torch.where((a == a.round()) & (b == b.round()), kept.round(), kept)
            for place, sign, magnitude in zip(places, (a.sign(), b.sign()), (kept, SUM_LIMIT - kept), strict=True):
                levels[row, place] = position[row, place] = sign * magnitude
                changed[row, place] = True
        return levels, changed


def _product(sizes: Sequence[int]) -> int:
    return int(torch.tensor([1, *sizes]).prod())


def _in_order(count: int) -> list[tuple[int, int]]:
    return [(even, even + 1) for even in range(0, count - 1, 2)]


def _in_slices(channels: int, slices: int) -> list[tuple[int, int]]:
    """Channels that may be neighbours, the slices in whichever order: in a slice, or where one ends and one begins."""
    size = channels // slices
    first = range(0, channels, size)
    inside = [(start + place, start + place + 1) for start in first for place in range(size - 1)]
    return inside + [(start + size - 1, other) for start in first for other in first if start != other]


def _rounds(pairs: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Pairs in rounds of disjoint ones."""
    pending, rounds = list(pairs), []
    while pending:
        taken: set[int] = set()
        one = {pair for pair in pending if not taken & {*pair} and not taken.update(pair)}
        pending = [pair for pair in pending if pair not in one]
        rounds.append(sorted(one))
    return rounds


def _round_robin(count: int) -> list[list[tuple[int, int]]]:
    """Each two of so many once, in rounds of disjoint pairs: all but one go around a circle."""
    players = list(range(count + count % 2))
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append([tuple(sorted(pair)) for pair in pairs if count not in pair])
        players.insert(1, players.pop())
    return rounds
