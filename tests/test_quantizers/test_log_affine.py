import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import log_affine

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer, build_quantizer

MODES = [('log1p', 2), ('log1p', 3), ('log1p', 4), ('log1p', 6), ('log1p', 8), ('exact', 4), ('shift', 2), ('shift', 4)]


def make(mode='log1p', bits=4, channels=3, location='median'):
    """A quantizer with different parameters on both sides and in every channel."""
    q = LogAffineQuantizer(bits, channels, mode, location)
    with torch.no_grad():
        if location == 'median':
            q.mu.copy_(torch.linspace(-0.2, 0.3, channels or 1).view(q.mu.shape))
        q.s.copy_(torch.linspace(0.5, 2, channels or 1).view(q.s.shape))
        q.log_k += torch.tensor([0.1, -0.15])
        q.learnable()['eps'] += torch.tensor([0.2, -0.1])
    return q


@pytest.mark.parametrize('mode,bits', MODES)
@pytest.mark.parametrize('learned', [False, True])
def test_value_and_every_gradient_match_reference(mode, bits, learned):
    torch.manual_seed(0)
    q = make(mode, bits)
    x = (torch.distributions.Laplace(0.0, 1.0).sample((3, 4, 50)) * 1.5).requires_grad_()
    h = torch.rand(x.shape).requires_grad_() if learned else None
    grad = torch.randn(x.shape)
    y = q(x, h)
    y.backward(grad)
    k, off = (p.detach().double().numpy() for p in q.side_params())
    totals = dict(k=np.zeros(2), off=np.zeros(2))
    for c in range(3):
        w, g = x[c].detach().double().numpy().ravel(), grad[c].double().numpy().ravel()
        mu, s = q.mu[c].item(), q.s[c].item()
        ref = log_affine(
            w, mu, s, k, off, mode, 2 ** (bits - 1), h[c].detach().double().numpy().ravel() if learned else None
        )
        close = dict(rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(y[c].detach().numpy().ravel(), ref['value'], **close)
        np.testing.assert_allclose(x.grad[c].numpy().ravel(), g * ref['w'], **close)
        np.testing.assert_allclose(q.mu.grad[c].item(), (g * ref['mu']).sum(), rtol=1e-3, atol=1e-3)
        factor = 1 / np.sqrt(len(w) * 2 ** (bits - 1))
        np.testing.assert_allclose(q.s.grad[c].item(), (g * ref['s']).sum() * factor, rtol=1e-3, atol=1e-3)
        for side in (0, 1):
            here = ref['side'] == side
            totals['k'][side] += (g * ref['k'])[here].sum()
            totals['off'][side] += (g * ref['off'])[here].sum()
        if learned:
            np.testing.assert_allclose(h.grad[c].numpy().ravel(), g * ref['rounding'], **close)
    # through the logarithms
    np.testing.assert_allclose(q.log_k.grad.numpy(), totals['k'] * k, rtol=1e-3, atol=2e-3)
    chain = off if mode == 'log1p' else 1
    np.testing.assert_allclose(q.learnable()['eps'].grad.numpy(), totals['off'] * chain, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('mag', [0.05, 0.7, 2.0, 50.0])
def test_log1p_formulas_by_finite_differences(sign, mag):
    """Straight through: the code is y plus a constant inside, and a constant outside the range."""
    mu, s, k, eps, count = 0.3, 0.8, 2.9, 1.2, 8
    w = mu + s * sign * mag
    ref = log_affine(np.array([w]), mu, s, (k, k), (eps, eps), 'log1p', count)
    shift, inside = float(ref['code'][0] - ref['y'][0]), bool(ref['inside'][0])

    def smooth(w, mu, s, k, eps):
        d = (w - mu) / s
        yh = k * np.log2(1 + abs(d) / eps) + shift if inside else count - 0.5
        return mu + s * np.sign(d) * eps * (2 ** (yh / k) - 1)

    at = [w, mu, s, k, eps]
    for i, name in enumerate(['w', 'mu', 's', 'k', 'off']):
        up, down = list(at), list(at)
        up[i] += 1e-6
        down[i] -= 1e-6
        assert ref[name][0] == pytest.approx((smooth(*up) - smooth(*down)) / 2e-6, abs=1e-7)


@pytest.mark.parametrize('mode,bits', MODES)
def test_decode_of_encode_is_forward_bit_for_bit(mode, bits):
    torch.manual_seed(1)
    q, x = make(mode, bits, 5), torch.randn(5, 40, 3)
    decoded, codes = q.decode(q.encode(x)), q.encode(x)
    with torch.no_grad():
        assert torch.equal(q(x).view(torch.int32), decoded.view(torch.int32))
    assert torch.equal(q(x.requires_grad_()).detach().view(torch.int32), decoded.view(torch.int32))
    assert codes.dtype == torch.int32 and 0 <= codes.min() and codes.max() < 2**bits
    table = q.table()
    assert table.dtype == torch.int8 and len(table) == 2**bits and (table.int().diff() >= 0).all()
    assert table.int().abs().max() == 127
    levels, scale = q.integer_levels()
    assert levels.shape == (5, 2**bits) and (levels.abs().amax(1) == 127).all()
    rows = torch.gather(levels, 1, codes.flatten(1).long()).view(codes.shape)
    assert torch.equal(decoded, rows.float() * scale.view(-1, 1, 1))
    # one int8 grid through zero costs half of its step at most
    exact = q.mu.detach().view(-1, 1, 1) + q.table_scale().view(-1, 1, 1) * table[codes]
    assert ((decoded - exact).abs() <= 0.501 * scale.view(-1, 1, 1)).all()
    h = torch.randint(0, 2, x.shape).float()
    assert torch.equal(q(x, h).detach(), q.decode(q.encode(x, h)))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30),
    st.sampled_from(MODES),
    st.floats(0.1, 3),
    st.floats(-0.3, 0.3),
)
def test_monotone_and_within_range(values, kind, s, mu):
    # above 4 bits the levels around a location are finer than an int8 grid through zero
    q = make(*kind, channels=None, location='median' if kind[1] <= 4 else 'zero')
    q.s.data.fill_(s)
    if q.location == 'median':
        q.mu.data.fill_(mu)
    x = torch.tensor(values).sort().values
    with torch.no_grad():
        y = q(x)
    assert (q.encode(x).diff() >= 0).all() and (y.diff() >= 0).all()
    ends = q.decode(torch.tensor(q.code_range))
    assert ends[0] <= y.min() and y.max() <= ends[1]
    if kind[0] != 'shift':  # as published, it does not invert psi
        assert torch.equal(q(y).detach(), y)


@pytest.mark.parametrize('mode', ['log1p', 'exact', 'shift'])
@pytest.mark.parametrize('location', ['auto', 'zero', 'median'])
def test_all_zero_channel_stays_zero(mode, location):
    torch.manual_seed(0)
    w = torch.randn(4, 30)
    w[2] = 0
    q = LogAffineQuantizer(4, 4, mode, location)
    q.fit_weight(w)
    y = q(w.requires_grad_())
    assert (y[2] == 0).all() and (q.decode(q.encode(w))[2] == 0).all()
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in [w, *q.learnable().values()])
    assert q.s.grad[2] == 0


def test_constant_tensor_and_huge_outlier():
    q = LogAffineQuantizer(4, 2)
    w = torch.full((2, 50), 0.75)
    q.fit_weight(w)
    torch.testing.assert_close(q(w).detach(), w, rtol=1e-5, atol=0)
    w = torch.randn(2, 500)
    w[0, 0] = 1e6
    q.fit_weight(w)
    y = q(w)
    assert torch.isfinite(y).all() and y[0, 0].item() == pytest.approx(1e6, rel=0.05)


@pytest.mark.parametrize('name,least,uniform', [('laplace', 17.6, (15.6, 16.1)), ('gauss', 19.8, (18.9, 19.45))])
def test_sqnr_at_4_bits(name, least, uniform):
    torch.manual_seed(0)
    w = torch.distributions.Laplace(0.0, 1.0).sample((4, 10000)) if name == 'laplace' else torch.randn(4, 10000)

    def sqnr(q):
        q.fit_weight(w)
        return 10 * torch.log10(w.square().sum() / (q(w) - w).square().sum()).item()

    assert sqnr(LogAffineQuantizer(4, 4)) >= least
    assert uniform[0] <= sqnr(AffineQuantizer(4, True, 4, 0)) <= uniform[1]
    assert sqnr(LogAffineQuantizer(4, 4, 'shift')) < uniform[0]


def test_location_is_kept_only_where_it_helps():
    torch.manual_seed(0)
    q = LogAffineQuantizer(4, 2)
    q.fit_weight(torch.randn(2, 400))
    assert q.location == 'zero' and 'mu' not in q.learnable() and (q.mu == 0).all()
    q.fit_weight(torch.randn(2, 400) + 3)
    assert q.location == 'median' and 'mu' in q.learnable() and (q.mu > 2).all()


def test_importance_moves_the_grid():
    torch.manual_seed(0)
    w, weight = torch.distributions.Laplace(0.0, 1.0).sample((2, 3000)), torch.ones(2, 3000)
    weight[w.abs() < 2] = 1e-3
    plain, weighted = LogAffineQuantizer(3, 2), LogAffineQuantizer(3, 2)
    plain.fit_weight(w)
    weighted.fit_weight(w, importance=weight)
    errors = [((q(w) - w).square() * weight).sum().item() for q in (plain, weighted)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize('mode,bits', MODES)
@pytest.mark.parametrize('shift', [0, 3])
def test_state_round_trip(mode, bits, shift):
    torch.manual_seed(0)
    w = torch.randn(3, 5, 7) + shift
    q = LogAffineQuantizer(bits, 3, mode)
    q.fit_weight(w)
    other = build_quantizer(q.spec())
    other.load_state_dict(q.state_dict(), strict=True)
    assert torch.equal(q(w), other(w)) and set(other.learnable()) == set(q.learnable())
    assert LogAffineQuantizer(learn=False).learnable() == {}


def test_negative_scale_counts_by_its_magnitude():
    q, x = make(), torch.randn(3, 20)
    before = q(x).detach()
    q.s.data.neg_()
    assert torch.equal(q(x).detach(), before)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_non_finite_is_refused_and_never_hidden(bad):
    q, w = make(), torch.ones(3, 4)
    w[1, 2] = bad
    for call in (q.encode, q.fit_weight):
        with pytest.raises(PTQError, match='NaN or infinity'):
            call(w)
    assert torch.isnan(q(w)[1, 2]) and torch.isfinite(q(w)[0]).all()


@pytest.mark.parametrize(
    'kwargs,told',
    [
        (dict(mode='log1'), "Did you mean 'log1p'"),
        (dict(bits=16), '2..8'),
        (dict(mode='shift', bits=5), r'2..4 in mode .shift'),
        (dict(location='medain'), "Did you mean 'median'"),
    ],
)
def test_bad_arguments(kwargs, told):
    with pytest.raises(PTQError, match=told):
        LogAffineQuantizer(**kwargs)


def test_auto_must_be_resolved():
    q = LogAffineQuantizer(mode='auto')
    for call in (q, q.encode, q.fit_weight):
        with pytest.raises(PTQError, match='resolve_auto'):
            call(torch.ones(2, 3))


@pytest.mark.parametrize('mode', ['log1p', 'exact', 'shift'])
def test_a_table_that_was_written_into_by_any_way_is_a_new_table(mode):
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    quantizer = LogAffineQuantizer(bits=4, num_channels=4, mode=mode)
    quantizer.fit_weight(weight)
    for name, parameter in quantizer.learnable().items():
        before = quantizer(weight).detach()
        parameter.data.mul_(1.3)
        changed = quantizer(weight).detach()
        fresh = LogAffineQuantizer(**{k: v for k, v in quantizer.spec().items() if k != 'type'})
        fresh.load_state_dict(quantizer.state_dict())
        assert torch.equal(changed, fresh(weight)), name
        assert (name == 'k' and mode == 'shift') or not torch.equal(changed, before), name
