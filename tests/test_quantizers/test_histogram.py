"""Streaming histograms: which values share a bin, and what the bins stand for, against NumPy."""

import numpy as np
import pytest
import torch

from mmdet_ptq.quantizers.histogram import NUM_BINS, StreamingHistogram


def of(*rows, weights=None):
    samples = torch.tensor(rows)
    histogram = StreamingHistogram(len(samples), weighted=weights is not None)
    histogram.add(samples, samples.amin(1), samples.amax(1), weights)
    return histogram


def test_each_value_lies_between_the_edges_of_its_bin():
    torch.manual_seed(0)
    rows = torch.stack([torch.randn(400), torch.rand(400) * 1e-6, torch.rand(400) * -3e4])
    histogram = of(*rows.tolist())
    for row, edges, counts in zip(rows.double().numpy(), histogram.edges().numpy(), histogram.counts, strict=True):
        assert edges[0] <= min(row.min(), 0) and edges[-1] > max(row.max(), 0)
        np.testing.assert_array_equal(counts, np.histogram(row, edges)[0])


def test_a_bin_is_as_narrow_as_a_power_of_two_may_be():
    histogram = of([0.0, 1023.5], [0.0, 1024.0], [-1.0, 1.0], [-0.25, 1023.5])
    # 1024 itself would need a bin more, as does what begins within a bin
    assert histogram.width.tolist() == [0.5, 1.0, 2.0**-9, 1.0]
    assert torch.equal(histogram.edges().diff(dim=1), histogram.width[:, None].expand(-1, NUM_BINS))
    assert histogram.low.tolist() == [0, 0, -1, -0.25] and histogram.high[0] == 1023.5


def test_zero_is_in_every_range_and_is_represented_by_itself():
    histogram = of([3.0, 5.0], [-5.0, -3.0])
    assert (histogram.edges()[:, 0] <= 0).all() and (histogram.edges()[:, -1] > 0).all()
    centers, index = histogram.centers(), histogram.absolute_index()
    middles = (histogram.edges()[:, 1:] + histogram.edges()[:, :-1]) / 2
    assert (centers[index == 0] == 0).all() and (index == 0).sum(1).tolist() == [1, 1]
    assert torch.equal(centers[index != 0], middles[index != 0])


def test_what_is_exactly_zero_is_not_spread_over_its_bin():
    histogram = of([0.0, 0.0, 0.0, 1e-9, 0.75, 1.0])
    assert histogram.zeros.tolist() == [3]
    spread = histogram.spread() * histogram.width
    assert histogram.counts.sum() == 6 and spread.sum() == 3
    assert spread[histogram.absolute_index() == 0].item() == 1


def test_magnitudes_fold_the_negative_side_onto_the_positive_one():
    values = [-3.9, -2.2, -0.3, 0.4, 2.1, 3.9, 0.0]
    histogram = of(values, [-value for value in values])
    edges = np.arange(NUM_BINS + 1) * histogram.width[0].item()
    for counts in histogram.magnitudes().numpy():
        np.testing.assert_array_equal(counts, np.histogram(np.abs(np.float32(values)), edges)[0])


@pytest.mark.parametrize('late', [0.5, 700.0])
def test_weights_are_counted_where_their_values_are(late):
    histogram = of([0.0, 1.0, 1.0, 2.0], weights=torch.tensor([[8.0, 0.5, 0.25, 4.0]]))
    histogram.add(torch.tensor([[late]]), torch.tensor([0.0]), torch.tensor([late]), torch.tensor([[32.0]]))
    weighted = histogram.by_weight()

    def at(counts, value):
        place = np.searchsorted(histogram.edges()[0].numpy(), value, 'right') - 1
        return counts[0, place].item()

    assert [at(weighted.counts, value) for value in (0, 1, 2, late)] == [8, 0.75, 4, 32]
    assert [at(histogram.counts, value) for value in (0, 1, 2, late)] == [1, 2, 1, 1]
    assert weighted.zeros.tolist() == [8] and histogram.zeros.tolist() == [1]
    assert weighted.spread().sum() == 36.75 / histogram.width
