import pytest
import torch

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import (
    AffineQuantizer,
    FisherObserver,
    KLObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
    build_observer,
)
from mmdet_ptq.quantizers.histogram import NUM_BINS, StreamingHistogram
from mmdet_ptq.quantizers.range_search import mse_range

ALL = [MinMaxObserver, MovingAverageObserver, PercentileObserver, KLObserver, MSEObserver, FisherObserver]


def batches(n=3):
    torch.manual_seed(0)
    return [torch.randn(2, 3, 8, 9) * (1 + i) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1) for i in range(n)]


def test_min_max_and_moving_average():
    plain, average = MinMaxObserver(3), MovingAverageObserver(0.9, 3)
    for x in batches():
        plain.update(x)
        average.update(x)
    whole = torch.stack(batches())
    low, high = plain.range(8, False)
    assert torch.equal(low, whole.amin((0, 1, 3, 4))) and torch.equal(high, whole.amax((0, 1, 3, 4)))
    tops = [x.amax((0, 2, 3)) for x in batches()]
    torch.testing.assert_close(average.range(8, False)[1], (tops[0] * 0.9 + tops[1] * 0.1) * 0.9 + tops[2] * 0.1)
    low, high = plain.range(8, True)
    assert torch.equal(low, -high)


def test_growing_a_histogram_is_exact():
    torch.manual_seed(0)
    # one channel grows with every part, the other with the first
    parts = [(torch.randn(2, 500) * torch.tensor([[10.0**i], [1000 - i]])).relu() for i in range(4)]
    weights = [torch.randint(0, 9, part.shape).float() for part in parts]  # whole numbers: their sums are exact
    grown, plain = StreamingHistogram(2, weighted=True), StreamingHistogram(2)
    for part, weight in zip(parts, weights, strict=True):
        grown.add(part, part.amin(1), part.amax(1), weight)
        plain.add(part, part.amin(1), part.amax(1))
    at_once = StreamingHistogram(2, weighted=True)
    whole, weight = torch.cat(parts, 1), torch.cat(weights, 1)
    at_once.add(whole, whole.amin(1), whole.amax(1), weight)
    for name in ('counts', 'zeros', 'weights', 'zero_weights', 'first', 'exponent'):
        assert torch.equal(getattr(grown, name), getattr(at_once, name)), name
        if 'weights' not in name:
            assert torch.equal(getattr(grown, name), getattr(plain, name)), name
    assert at_once.counts.sum() == whole.numel() and torch.equal(at_once.zeros, (whole == 0).sum(1).double())
    by_weight = at_once.by_weight()
    assert torch.equal(by_weight.counts.sum(1), weight.double().sum(1))
    assert torch.equal(by_weight.zeros, torch.where(whole == 0, weight, 0).double().sum(1))


def test_percentile_against_quantile():
    x = torch.randn(1, 1, 300, 300)
    o = PercentileObserver(99)
    o.update(x)
    low, high = o.range(8, False)
    width = o.histogram.width.item()
    assert abs(low - x.flatten().double().quantile(0.01)) < 2 * width
    assert abs(high - x.flatten().double().quantile(0.99)) < 2 * width
    assert abs(o.range(8, True)[1] - x.abs().flatten().double().quantile(0.99)) < 2 * width


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [3, 4, 8])
def test_mse_is_near_brute_force(bits, symmetric):
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, 1, 100, 100))
    if not symmetric:
        x = x.relu()
    o = MSEObserver()
    o.update(x)

    def error(top):
        if symmetric:
            last = 2 ** (bits - 1) - 1
            s = top / last
            return ((x / s).round().clamp(-last - 1, last) * s - x).square().sum().item()
        s = top / (2**bits - 1)
        return ((x / s).round().clamp(0, 2**bits - 1) * s - x).square().sum().item()

    best = min(error(x.abs().max() * r) for r in torch.linspace(0.02, 1, 400))
    assert error(o.range(bits, symmetric)[1]) <= 1.03 * best


def test_kl_clips_a_long_tail_but_not_a_uniform_distribution():
    torch.manual_seed(0)
    o, x = KLObserver(), torch.rand(1, 1, 200, 200)
    o.update(x)
    assert o.range(8, False)[1] > 0.95
    o, x = KLObserver(), torch.randn(1, 1, 200, 200).relu()
    x[0, 0, 0, 0] = 40
    o.update(x)
    assert 1.5 < o.range(8, False)[1] < 39


@pytest.mark.parametrize('cls', ALL)
@pytest.mark.parametrize('channels', [None, 3])
def test_edge_cases(cls, channels):
    o = cls(num_channels=channels)
    with pytest.raises(PTQError, match='before it saw any data'):
        o.range(8, False)
    for bad in (float('nan'), float('inf')):
        with pytest.raises(PTQError, match='non-finite activations'):
            o.update(torch.full((1, 3, 2, 2), bad))
    o.update(torch.zeros(1, 3, 4, 4))
    o.update(torch.zeros(0, 3, 4, 4))
    assert all((end == 0).all() for end in o.range(8, False))
    o = cls(num_channels=channels)
    o.update(torch.full((1, 3, 4, 4), 2.5))
    for bits in (2, 8, 16):
        low, high = o.range(bits, False)
        assert low.shape == (() if channels is None else (3,)) and (low == 0).all() and (high > 0.5).all()
    x = torch.randn(1, 3, 40, 40)
    x[0, :, 3, 3] = 1e6
    o.update(x)
    # the moving average takes a tenth of the new extreme: 0.9 * 2.5 + 0.1 * 1e6
    assert o.high.max().item() == pytest.approx(1e6 if cls is not MovingAverageObserver else 100002.25)
    assert all(torch.isfinite(end).all() for end in o.range(8, True))
    if hasattr(o, 'histogram'):
        assert o.histogram.counts.shape[1] == NUM_BINS


def test_build_and_bad_arguments():
    assert build_observer(dict(type='mmdet_ptq.PercentileObserver', percentile=99.0)).percentile == 99
    with pytest.raises(PTQError, match="Did you mean 'MSEObserver'"):
        build_observer(dict(type='MSEObserve'))
    with pytest.raises(PTQError, match='percentile'):
        PercentileObserver(percentile=0.9999)
    with pytest.raises(PTQError, match='4 channels on axis 1'):
        MinMaxObserver(4).update(torch.ones(1, 3))


@pytest.mark.parametrize('symmetric', [True, False])
def test_mse_with_steps_narrower_than_bins_is_near_brute_force(symmetric):
    """A far outlier makes bins wide; what lies in one of them is not at its center."""
    x = torch.cat([torch.randn(20000) * 0.5, torch.full((1,), 60.0)])
    x = x if symmetric else x.abs()
    observer = MSEObserver()
    observer.update(x)
    low, high = observer.range(8, symmetric)

    def error(low: torch.Tensor, high: torch.Tensor) -> float:
        quantizer = AffineQuantizer(8, symmetric)
        quantizer.set_range(low, high)
        return float((quantizer(x) - x).square().sum())

    least = min(error(low * 0 - top * symmetric, low * 0 + top) for top in torch.linspace(0.3, 60, 600))
    assert error(low, high) <= 1.02 * least


def test_fisher_range_follows_what_matters():
    x = torch.cat([torch.randn(5000), torch.linspace(20, 400, 40)])
    plain, fisher = MSEObserver(), FisherObserver()
    for observer in (plain, fisher):
        observer.update(x)
    assert fisher.range(8, False) == plain.range(8, False)  # nothing was told
    fisher.weigh(x, (x < 5).float())
    assert fisher.range(8, False)[1] < 6 < 100 < plain.range(8, False)[1]


def test_fisher_range_does_not_move_values_into_where_the_function_is_not_flat():
    """Far below zero SiLU has no slope, and yet a value clipped from there to -1 changes by 0.27."""
    torch.manual_seed(0)
    x = torch.randn(20000) * 3
    steps = x.detach().requires_grad_()
    torch.nn.functional.silu(steps).sum().backward()
    fisher = FisherObserver()
    fisher.update(x)
    fisher.weigh(x, steps.grad.square())
    low, high = fisher.range(8, False)
    # as if each value's own slope told what clipping it changes
    own = mse_range(fisher.weighed.by_weight(), x.min()[None].double(), x.max()[None].double(), 8, False)

    def change(low, high):
        quantizer = AffineQuantizer(8, False)
        quantizer.set_range(low.float().reshape(()), high.float().reshape(()))
        return (torch.nn.functional.silu(quantizer(x)) - torch.nn.functional.silu(x)).square().mean().item()

    least = min(change(low, high) for low in -torch.linspace(1, 14, 131))
    assert change(low, high) <= 1.01 * least < 1.1 * least < change(*own)


def test_fisher_range_is_wider_where_more_channels_are_clipped_at_once():
    x = torch.randn(1, 1, 20000) ** 3
    ends = []
    for channels in (1, 4, 64):
        observer = FisherObserver()
        shared = x.reshape(-1, 1).expand(-1, channels)
        observer.update(shared)
        observer.weigh(shared, torch.ones_like(shared))
        assert observer.together == channels**0.5
        ends.append(float(observer.range(4, False)[1]))
    assert ends[0] < ends[1] < ends[2]


def test_fisher_weights_that_are_all_alike_change_nothing_and_silent_channels_count_alike():
    x = torch.randn(3, 2, 50) ** 3
    plain, fisher = MSEObserver(num_channels=2), FisherObserver(num_channels=2)
    for observer in (plain, fisher):
        observer.update(x)
    fisher.weigh(x, torch.full_like(x, 0.25))
    torch.testing.assert_close(fisher.range(8, False), plain.range(8, False))
    fisher = FisherObserver(num_channels=2)
    fisher.update(x)
    weight = torch.zeros_like(x)
    weight[:, 0] = 1.0
    fisher.weigh(x, weight)
    torch.testing.assert_close(fisher.range(8, False), plain.range(8, False))


def test_few_values_that_matter_do_not_decide_what_is_clipped():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1, 2, 20000), 40 + torch.rand(1, 2, 20)], dim=2)
    plain, fisher = MSEObserver(num_channels=2), FisherObserver(num_channels=2)
    for observer in (plain, fisher):
        observer.update(x)
    weight = torch.zeros_like(x)
    weight[:, 0, :1000] = weight[:, 1, :5000] = 1e-15  # so small that the square of a square is beyond single precision
    for part in (slice(0, 10000), slice(10000, None)):
        fisher.weigh(x[..., part], weight[..., part])
    (_, few), (_, plain_high) = ((side.tolist() for side in observer.range(8, False)) for observer in (fisher, plain))
    assert few[0] == plain_high[0] > 20 and few[1] < 5
