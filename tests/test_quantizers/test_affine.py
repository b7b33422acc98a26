import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import affine

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer, MinMaxObserver, MSEObserver, build_quantizer

BITS = (2, 3, 4, 5, 6, 7, 8, 16)


def make(bits=8, symmetric=False, channels=None, axis=1, low=-1.3, high=2.1, **kwargs):
    q = AffineQuantizer(bits, symmetric, channels, axis, **kwargs)
    spread = torch.ones(()) if channels is None else torch.linspace(0.5, 2, channels)
    q.set_range(low * spread, high * spread)
    return q


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('channels,axis', [(None, 1), (3, 1), (2, 0), (5, -1)])
@pytest.mark.parametrize('learned', [True, False])
def test_value_and_gradient_match_reference(bits, symmetric, channels, axis, learned):
    torch.manual_seed(0)
    q = make(bits, symmetric, channels, axis)
    x = (torch.randn(2, 3, 4, 5) * 2).requires_grad_()
    h = torch.rand(x.shape).requires_grad_() if learned else None
    grad = torch.randn(x.shape)
    y = q(x, h)
    y.backward(grad)
    shape = [1] * 4
    if channels:
        shape[axis] = channels
    scale, zero = q.scale.detach().double().view(shape).numpy(), q.zero_point.view(shape).numpy()
    low, high = q.code_range
    # the division is made in float32 by the quantizer
    value, dx, ds, dh = affine(
        x.detach().double().numpy(), scale, zero, low, high, h.detach().double().numpy() if learned else None
    )
    ours = y.detach().numpy()
    ties = np.abs(ours - value) > 1e-4
    assert ties.mean() < (0.02 if bits == 16 else 1e-9)
    g = grad.double().numpy()
    np.testing.assert_allclose(x.grad.numpy(), g * dx, rtol=1e-5, atol=1e-6)
    factor = 1 / np.sqrt(x.numel() // q.scale.numel() * high)
    axes = tuple(i for i in range(4) if shape[i] == 1)
    if bits < 16:
        np.testing.assert_allclose(q.scale.grad.numpy(), ((g * ds).sum(axes) * factor), rtol=2e-3, atol=2e-3)
    if learned:
        np.testing.assert_allclose(h.grad.numpy(), g * dh, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('shape', [(2, 3, 5, 7), (4, 3, 160, 160)])
def test_decode_of_encode_is_forward_bit_for_bit(symmetric, bits, shape):
    torch.manual_seed(1)
    x = torch.randn(shape)
    for channels in (None, 3):
        q = make(bits, symmetric, channels)
        with torch.no_grad():
            plain = q(x)
        trained, decoded = q(x.requires_grad_()).detach(), q.decode(q.encode(x))
        # as integers, so that -0.0 and 0.0 differ
        assert torch.equal(plain.view(torch.int32), decoded.view(torch.int32))
        assert torch.equal(trained.view(torch.int32), decoded.view(torch.int32))
        codes = q.encode(x)
        assert codes.dtype == torch.int32
        assert q.code_range[0] <= codes.min() and codes.max() <= q.code_range[1]
        x = x.detach()


def test_hard_learned_rounding_is_what_encode_stores():
    q, x = make(4, True, 3), torch.randn(2, 3, 8)
    h = torch.randint(0, 2, x.shape).float()
    assert torch.equal(q(x, h).detach(), q.decode(q.encode(x, h)))
    assert not torch.equal(q.encode(x, h), q.encode(x))


floats = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=30, deadline=None)
@given(st.lists(floats, min_size=2, max_size=20), st.sampled_from(BITS), st.booleans())
def test_numerics(values, bits, symmetric):
    x = torch.tensor(values).sort().values
    q = AffineQuantizer(bits, symmetric)
    q.set_range(x.min(), x.max())
    assert torch.isfinite(q.scale) and q.scale > 0
    with torch.no_grad():
        y = q(x)
    assert (y.diff() >= 0).all()
    assert torch.equal(q(y).detach(), y)
    assert q(torch.zeros(3)).abs().max() == 0
    low, high = q.decode(torch.tensor(q.code_range)).tolist()
    assert low <= y.min() and y.max() <= high
    # half a step inside the range, and half a step more for the rounded zero point
    assert ((y - x).abs() <= q.scale * 1.001 + 1e-6).all()


ends = st.tuples(st.floats(-1e6, 0, width=32), st.floats(0, 1e6, width=32))


@settings(max_examples=60, deadline=None)
@given(st.lists(ends, min_size=1, max_size=6), st.sampled_from(BITS), st.booleans())
def test_one_zero_point_for_all_channels_covers_every_range_and_no_more(ranges, bits, narrow):
    low, high = torch.tensor(ranges, dtype=torch.float32).unbind(1)
    q = AffineQuantizer(bits, num_channels=len(ranges), channel_axis=0, narrow_range=narrow, shared_zero_point=True)
    q.set_range(low, high)
    first, last = q.code_range
    assert q.zero_point.unique().numel() == 1 and first <= q.zero_point[0] <= last
    assert torch.isfinite(q.scale).all() and (q.scale > 0).all()
    codes = torch.tensor(q.code_range).expand(len(ranges), 2)
    below, above = q.decode(codes).unbind(1)
    slack = q.scale.detach() * (last - first) * 1e-6
    assert (below <= low + slack).all() and (high <= above + slack).all()
    # every channel touches an end: no scale could be smaller with this zero point
    live = high - low > 2.0**-40 * 2**17
    assert ((low - below < slack) & (low < 0) | (above - high < slack) & (high > 0))[live].all()
    assert (q.scale[high - low == 0] == 1).all()

    def cost(zero):
        scale = torch.stack(
            [
                -low.double() / (zero - first) if zero > first else torch.where(low < 0, torch.inf, 0.0),
                high.double() / (last - zero) if zero < last else torch.where(high > 0, torch.inf, 0.0),
            ]
        )
        used = high - low > 0
        return (scale.amax(0)[used] / (high - low)[used].double()).square().sum()

    # no other zero point costs less
    best = cost(int(q.zero_point[0]))
    others = range(first, last + 1, 1 if bits <= 8 else 499)
    neighbours = [zero for zero in (q.zero_point[0] - 1, q.zero_point[0] + 1) if first <= zero <= last]
    assert all(best <= cost(int(zero)) * (1 + 1e-9) for zero in (*others, *neighbours))


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('narrow', [False, True])
def test_one_zero_point_costs_nothing_where_no_channel_needs_it(bits, narrow):
    kwargs = dict(bits=bits, num_channels=3, narrow_range=narrow)
    shared, plain = AffineQuantizer(**kwargs, shared_zero_point=True), AffineQuantizer(**kwargs)
    # ReLU; what is never positive; ranges of one form; nothing at all
    for low, high in (
        ([0, 0, 0], [1, 5, 0]),
        ([-2, -3, -1e-3], [0, 0, 0]),
        ([-1, -2, -4], [1, 2, 4]),
        ([0, 0, 0], [0, 0, 0]),
    ):
        for q in (shared, plain):
            q.set_range(torch.tensor(low), torch.tensor(high))
        live = torch.tensor(high) > torch.tensor(low)
        near = abs(shared.zero_point - plain.zero_point)[live].tolist()
        assert near == [0] * len(near) or low[0] < 0 < high[0]
        tight = 2**bits if low[0] < 0 < high[0] else torch.inf  # a rounded zero point leaves half a step
        torch.testing.assert_close(shared.scale, plain.scale, rtol=1e-6 + 2 / tight, atol=0)
        assert q.code_range[0] <= shared.zero_point[0] <= q.code_range[1]


def test_one_zero_point_between_two_channels_that_want_different_ones():
    q = AffineQuantizer(8, num_channels=2, channel_axis=0, shared_zero_point=True)
    q.set_range(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0]))
    assert 0 < q.zero_point[0] < 127 and (q.scale[0] > 2 / 255) and (q.scale[1] > 1 / 255)
    assert build_quantizer(q.spec()).shared_zero_point
    # a weight's clip ratios are searched channel by channel first
    q.fit_weight(torch.randn(2, 500) + torch.tensor([[0.0], [2.0]]))
    assert q.zero_point[0] == q.zero_point[1]
    # without it, and with signed codes, nothing changes
    q = AffineQuantizer(8, True, 2, shared_zero_point=True)
    q.set_range(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0]))
    assert torch.equal(q.scale, torch.full((2,), 1 / 127)) and not q.zero_point.any()


@pytest.mark.parametrize('fill', [0.0, 3.0, -2.5, 1e-30])
@pytest.mark.parametrize('symmetric', [True, False])
def test_constant_tensor(fill, symmetric):
    q, x = AffineQuantizer(8, symmetric, 2, 0), torch.full((2, 9), fill)
    q.fit_weight(x)
    assert torch.isfinite(q.scale).all() and (q.scale > 0).all()
    torch.testing.assert_close(q(x).detach(), x, rtol=1e-2, atol=1e-12)


def test_huge_outlier_keeps_the_bulk_when_importance_says_so():
    torch.manual_seed(0)
    w = torch.randn(1, 1000)
    w[0, 0] = 1e6
    q = AffineQuantizer(8, True, 1, 0)
    q.fit_weight(w)
    assert q(w)[0, 0] > 9e5
    w[0, 0] = 60
    importance = torch.ones(1000)
    importance[0] = 0
    q.fit_weight(w, importance=importance)
    assert q.scale < 60 / 127 / 10


@pytest.mark.parametrize('bits,least', [(2, 6.7), (3, 11.2), (4, 15.6), (8, 36)])
def test_fit_on_laplace_beats_min_max(bits, least):
    torch.manual_seed(0)
    w = torch.distributions.Laplace(0.0, 1.0).sample((8, 4000))
    q, plain = AffineQuantizer(bits, True, 8, 0), AffineQuantizer(bits, True, 8, 0)
    q.fit_weight(w)
    plain.fit_weight(w, observer=MinMaxObserver(8, 0))
    sqnr, worse = (10 * torch.log10(w.square().sum() / (m(w) - w).square().sum()).item() for m in (q, plain))
    assert sqnr > max(least, worse)


def test_range_touches_its_ends_and_zero():
    q = AffineQuantizer(8)
    q.set_range(torch.tensor(2.0), torch.tensor(5.0))
    assert q.zero_point == 0 and q(torch.tensor([5.0])).item() == pytest.approx(5.0, rel=1e-6)
    q = AffineQuantizer(8, symmetric=True, narrow_range=True)
    q.set_range(torch.tensor(-3.0), torch.tensor(1.0))
    assert q.code_range == (-127, 127) and q(torch.tensor([-3.0])).item() == pytest.approx(-3.0, rel=1e-6)


def test_scale_below_the_floor_recovers():
    q = make(4, True)
    q.scale.data.fill_(-1.0)
    y = q(torch.ones(4))
    assert torch.isfinite(y).all()
    (y - 1).square().sum().backward()
    assert q.scale.grad < 0


def test_half_precision_and_empty():
    q = make()
    x = torch.randn(4, 4).half()
    assert q(x).dtype == torch.half and torch.equal(q(x), q(x.float()).half())
    assert q(torch.zeros(0, 3)).shape == (0, 3)


def test_state_round_trip():
    q = make(4, False, 3, learn_scale=False)
    other = build_quantizer(q.spec())
    other.load_state_dict(q.state_dict(), strict=True)
    x = torch.randn(2, 3, 4)
    assert torch.equal(q(x), other(x)) and other.spec() == q.spec() and other.learnable() == {}
    assert set(make().learnable()) == {'scale'}


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_non_finite_is_refused(bad):
    q, x = AffineQuantizer(8, True, 2, 0), torch.ones(2, 3)
    x[1, 1] = bad
    for call in (q.encode, q.fit_weight, lambda t: q.set_range(t.amin(1), t.sum(1))):
        with pytest.raises(PTQError, match='NaN or infinity'):
            call(x)


@pytest.mark.parametrize(
    'kwargs,told',
    [
        (dict(bits=9), '`bits` must be one of 2..8 or 16, got 9'),
        (dict(bits=1), 'got 1'),
        (dict(bits=4.0), 'got 4.0'),
        (dict(num_channels=0), '`num_channels`'),
    ],
)
def test_bad_arguments(kwargs, told):
    with pytest.raises(PTQError, match=told):
        AffineQuantizer(**kwargs)


def test_shapes_that_do_not_fit():
    with pytest.raises(PTQError, match='3 channels on axis 1'):
        make(8, False, 3)(torch.ones(2, 4))
    with pytest.raises(PTQError, match='does not fit'):
        AffineQuantizer(8, False, 3).set_range(torch.zeros(2), torch.ones(2))
    with pytest.raises(PTQError, match='does not broadcast'):
        AffineQuantizer(8, True, 3, 0).fit_weight(torch.ones(3, 4), importance=torch.ones(5))


def test_training_never_widens_a_range_beyond_what_was_seen():
    q, observer = AffineQuantizer(8, num_channels=3), MinMaxObserver(num_channels=3)
    x = torch.rand(4, 3, 5, 5) * 6
    x[:, 2] = 0
    observer.update(x)
    q.fit_activation(observer)
    assert torch.equal(q.scale[:2], x.amax((0, 2, 3))[:2] / 255) and q.scale[2] == q.scale[:2].max()
    seen = q.scale.detach().clone()
    q.scale.data.mul_(1.5)
    assert torch.equal(q.positive_scale(), seen)
    q(x).sum().backward()
    assert q.scale.grad is not None
    q.scale.data.copy_(seen / 2)
    assert torch.equal(q.positive_scale(), seen / 2)
    other = build_quantizer(q.spec())
    other.load_state_dict(q.state_dict())
    assert torch.equal(other.scale_limit, q.scale_limit)
    q.set_range(torch.zeros(3), torch.full((3,), 9.0))
    assert torch.isinf(q.scale_limit).all()


@pytest.mark.parametrize('symmetric', [False, True])
def test_a_clipped_range_may_grow_to_the_extremes(symmetric):
    torch.manual_seed(0)
    x = torch.randn(4000)
    x[0] = 40
    q, observer = AffineQuantizer(8, symmetric), MSEObserver()
    observer.update(x)
    q.fit_activation(observer)
    q.scale.data.fill_(1e3)
    ends = q.decode(torch.tensor(q.code_range))
    assert ends[1] == pytest.approx(40, rel=0.1) or ends[0] <= x.min()


def test_gradients_survive_writing_into_the_output():
    """mmdet's transformers add reference points to what a layer returned, in place."""

    def gradients(write):
        torch.manual_seed(0)
        x = torch.randn(4, 6, requires_grad=True)
        quantizer = AffineQuantizer(8)
        quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
        write(quantizer(x)).square().sum().backward()
        return x.grad, *(p.grad for p in quantizer.parameters() if p.grad is not None)

    def in_place(y):
        y[:, :2] += 1
        return y

    ours = gradients(in_place)
    assert len(ours) > 1
    for mine, plain in zip(ours, gradients(lambda y: y + torch.tensor([1.0, 1, 0, 0, 0, 0])), strict=True):
        torch.testing.assert_close(mine, plain)
