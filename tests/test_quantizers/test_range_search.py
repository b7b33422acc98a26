"""Ranges from histograms: by hand where it can be, and what must hold of every range."""

import math

import numpy as np
import pytest
import torch

from mmdet_ptq.quantizers.histogram import NUM_BINS, StreamingHistogram
from mmdet_ptq.quantizers.range_search import kl_divergence, kl_threshold, mse_range, quantile_range


def of(*rows):
    """A histogram of some channels, with its ends."""
    samples = torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in rows])
    low, high = samples.amin(1).clamp_max(0).double(), samples.amax(1).clamp_min(0).double()
    histogram = StreamingHistogram(len(samples))
    histogram.add(samples, low, high)
    return histogram, low, high


def laplace(count, scale=1.0):
    return torch.distributions.Laplace(0.0, scale).sample((count,))


def test_quantiles_are_linear_within_a_bin():
    # 1000 values, in every other bin of width 1/2, from its lower edge on
    histogram, low, high = of(np.arange(1000) - 199.5)
    ends = quantile_range(histogram, low, high, 0.9375, symmetric=False)
    # half of the 63rd value from below, and of the 938th
    assert [end.item() for end in ends] == [-199.5 + 62 + 0.25, -199.5 + 937 + 0.25]
    # of the magnitudes, each of the first 200 is there twice
    low_end, high_end = quantile_range(histogram, low, high, 0.875, symmetric=True)
    assert high_end.item() == 200 + (875 - 400) and low_end == -high_end


@pytest.mark.parametrize('symmetric', [False, True])
def test_quantiles_lie_within_what_was_seen_and_around_zero(symmetric):
    rows = [[3.0, 3.0, 3.1], [-3.1, -3.0, -3.0], [0.0, 0.0, 0.0], [-1.0, 2.0, 1.0]]
    histogram, low, high = of(*rows)
    for share in (0.51, 0.9, 1.0):
        first, last = quantile_range(histogram, low, high, share, symmetric)
        if symmetric:
            assert (first == -last).all() and (last <= torch.maximum(-low, high)).all() and (last >= 0).all()
        else:
            assert ((low <= first) & (first <= 0) & (last >= 0) & (last <= high)).all()


def divergence(counts, size, levels):
    """In plain Python: the reference takes what is clipped into its last bin, the quantized counts do not."""
    p = np.array([*counts[: size - 1], counts[size - 1 :].sum()], float)
    q = np.zeros(size)
    for level in range(levels):
        group = [i for i in range(size) if min(i * levels // size, levels - 1) == level and counts[i] > 0]
        for i in group:
            q[i] = counts[group].sum() / len(group)
    p, q = p / p.sum(), q / q.sum()
    return sum(a * math.log(a / max(b, 1e-10)) for a, b in zip(p, q, strict=True) if a > 0)


def test_the_divergence_is_that_of_its_definition():
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 9, (5, 40)).astype(float)
    for levels, size in ((8, [8, 40, 13, 24, 39]), (16, [40, 16, 17, 33, 20])):
        found = kl_divergence(torch.from_numpy(counts), torch.tensor(size), levels)
        expected = [divergence(row, end, levels) for row, end in zip(counts, size, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    # a level for every bin, and nothing beyond: nothing is lost
    assert kl_divergence(torch.from_numpy(counts[:1]), torch.tensor([40]), 40).item() == 0


def test_nothing_is_clipped_where_there_are_as_many_levels_as_bins():
    tail = torch.cat([laplace(2000).abs(), torch.tensor([100.0])])
    histogram, low, high = of(tail, torch.cat([-tail[:1], tail[1:]]))
    # the second channel holds a negative value, and so has the levels of signed codes
    clipped = kl_threshold(histogram, NUM_BINS, 128, low < 0)
    assert 2 < clipped[0] < 50 and torch.isinf(clipped[1])
    clipped = kl_threshold(histogram, 128, NUM_BINS, low < 0)
    assert torch.isinf(clipped[0]) and 2 < clipped[1] < 50


@pytest.mark.parametrize('symmetric', [False, True])
def test_the_least_error_is_found_within_the_range_and_scales_with_it(symmetric):
    x = laplace(3000)
    histogram, low, high = of(x)
    first, last = mse_range(histogram, low, high, 4, symmetric)
    assert low.clamp(max=-high if symmetric else 0) < first < 0 < last < torch.maximum(-low, high)
    assert not symmetric or first == -last
    # bins are powers of two, so that nothing is rounded otherwise
    eighth = mse_range(*of(x / 8), 4, symmetric)
    assert [end.item() for end in eighth] == [first.item() / 8, last.item() / 8]


def test_more_bits_clip_less_and_sixteen_nothing():
    histogram, low, high = of(torch.cat([laplace(4000), torch.tensor([30.0, -20.0])]))
    tops = [mse_range(histogram, low, high, bits, True)[1].item() for bits in (2, 4, 6, 8)]
    assert tops == sorted(tops) and tops[0] < tops[-1] < 30
    assert [end.item() for end in mse_range(histogram, low, high, 16, False)] == [-20, 30]
    assert [end.item() for end in mse_range(histogram, low, high, 16, True)] == [-30, 30]


@pytest.mark.parametrize('symmetric', [False, True])
def test_a_channel_has_its_range_whatever_the_others_hold(symmetric):
    rows = [laplace(2000), laplace(2000, 50.0).abs(), torch.zeros(2000), torch.rand(2000) - 0.9]
    one = mse_range(*of(*rows), 4, symmetric)
    other = mse_range(*of(*rows[::-1]), 4, symmetric)
    for end, twin in zip(one, other, strict=True):
        assert torch.equal(end, twin.flip(0)) and end[2] == 0
