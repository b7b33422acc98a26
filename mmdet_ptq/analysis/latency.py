"""Latency as a ratio: two models in turn, so that what else the machine does meets both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WARM_UP = 5


@dataclass
class LatencyRatio:
    """Times of two models that ran in turn.

    Attributes:
        ratio: Median over pairs of (first / second); above 1, the second is faster.
        first_ms: Median time of the first, in milliseconds.
        second_ms: Median time of the second.
        pairs: How many pairs were timed.
    """

    ratio: float
    first_ms: float
    second_ms: float
    pairs: int


def latency_ratio(
    first: Callable[[], Any], second: Callable[[], Any], pairs: int = 40, pause: float = 0.0
) -> LatencyRatio:
    """Times two functions in interleaved pairs, the order within a pair changing each time.

    Args:
        first: Runs one model once.
        second: Runs the other.
        pairs: How many pairs. Defaults to 40.
        pause: Seconds before each run, which an untimed one then follows. Models with more than one thread need some:
            threads of one that wait in a loop for more work take the time of the other. Defaults to 0.
    """
    for _ in range(WARM_UP):
        first()
        second()
    times: list[tuple[float, float]] = []
    for number in range(pairs):
        order = (first, second) if number % 2 == 0 else (second, first)
        pair = [_seconds(run, pause) for run in order]
        times.append((pair[0], pair[1]) if number % 2 == 0 else (pair[1], pair[0]))
    return LatencyRatio(
        ratio=statistics.median(a / b for a, b in times),
        first_ms=1e3 * statistics.median(a for a, _ in times),
        second_ms=1e3 * statistics.median(b for _, b in times),
        pairs=pairs,
    )


def _seconds(run: Callable[[], Any], pause: float) -> float:
    if pause:
        time.sleep(pause)
        run()  # what was idle is slow at first
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
