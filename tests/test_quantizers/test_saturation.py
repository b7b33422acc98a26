"""The bound on neighbouring weights: who is a neighbour, and that nothing ever exceeds it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import SUM_LIMIT, LogAffineQuantizer, Neighbours, build_observer, build_quantizer

SHAPES = [
    (16, (3, 3)),
    (15, (1, 1)),
    (3, (3, 3)),
    (1, (3, 3)),
    (5, (3,)),
    (7, ()),
    (2, (2, 2, 2)),
    (1, ()),
    (1, (7, 7)),
    (4, (2, 2), 4),
    (12, (3, 3), 4),
]


def quantizer(rows, neighbours, **options):
    return build_quantizer(
        {
            **dict(
                type='AffineQuantizer',
                bits=8,
                symmetric=True,
                num_channels=rows,
                channel_axis=0,
                neighbours=None if neighbours is None else neighbours.spec(),
            ),
            **options,
        }
    )


def all_pairs(neighbours):
    return {tuple(sorted(pair)) for pairing in neighbours.pairings() for pair in pairing.T.tolist()}


def reference_sum(levels, neighbours):
    """The largest sum of two neighbours of one sign in each row, pair by pair."""
    found = []
    for row in levels.tolist():
        sums = [abs(row[a] + row[b]) for a, b in all_pairs(neighbours) if row[a] * row[b] > 0]
        found.append(max(sums, default=0))
    return found


def test_neighbours_by_hand():
    # (channel, row, column) of a 2 x 2 kernel: places 0 .. 3 are channel 0
    assert all_pairs(Neighbours(2, (2, 2))) == {(0, 4), (1, 5), (2, 6), (3, 7)}
    # three channels: in memory c0 c1 | c2 c0' | c1' c2', and filled up c0 c1 | c2 -
    assert all_pairs(Neighbours(3, (1, 2))) == {(0, 2), (1, 4), (3, 5), (1, 3)}
    assert all_pairs(Neighbours(5)) == {(0, 1), (2, 3)}
    assert all_pairs(Neighbours(1, (2, 2))) == set(itertools.combinations(range(4), 2))
    # slices of one colour: in whichever order; of three: their colours stay together
    assert all_pairs(Neighbours(4, (1, 1), slices=4)) == set(itertools.combinations(range(4), 2))
    assert all_pairs(Neighbours(4, (3, 3), slices=4)) == set(itertools.combinations(range(36), 2))
    assert all_pairs(Neighbours(6, (1, 1), slices=2)) == {(0, 1), (1, 2), (3, 4), (4, 5), (2, 3), (0, 5)}
    assert all_pairs(Neighbours(1)) == set()


@pytest.mark.parametrize('shape', SHAPES)
def test_pairings_are_disjoint_and_partners_mutual(shape):
    neighbours = Neighbours(*shape)
    pairs = [tuple(pair) for pairing in neighbours.pairings() for pair in pairing.T.tolist()]
    assert len(pairs) == len(set(pairs))
    for pairing in neighbours.pairings():
        assert len(pairing.flatten().unique()) == pairing.numel()
    partners = neighbours.partners()
    told = {tuple(sorted((place, other))) for row in partners.tolist() for place, other in enumerate(row) if other >= 0}
    assert told == all_pairs(neighbours)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.floats(0.2, 3))
def test_bound_levels_never_exceed_the_limit(shape, seed, width):
    neighbours = Neighbours(*shape)
    generator = torch.Generator().manual_seed(seed)
    position = (torch.randn(3, neighbours.size, generator=generator) * 64 * width).clamp(-128, 127)
    levels = position.round()
    bound, changed = neighbours.bound(levels, position)
    assert max(reference_sum(bound, neighbours)) <= SUM_LIMIT
    assert neighbours.largest_sum(bound).tolist() == reference_sum(bound, neighbours)
    assert (bound == bound.round()).all()
    # magnitudes only fall, signs stay, and what is within the limit stays as it is
    assert (bound.abs() <= levels.abs()).all() and (bound * levels >= 0).all()
    if changed is None:
        assert max(reference_sum(levels, neighbours)) <= SUM_LIMIT and torch.equal(bound, levels)
    else:
        assert torch.equal(bound[~changed], levels[~changed])
    again, unchanged = neighbours.bound(bound)
    assert unchanged is None and torch.equal(again, bound)


def test_a_pair_goes_to_the_nearest_levels():
    neighbours = Neighbours(2)
    position = torch.rand(500, 2) * 127 * torch.tensor([[1.0], [-1.0]]).repeat(250, 1)
    bound, _ = neighbours.bound(position.round(), position)
    every = torch.cartesian_prod(torch.arange(0.0, 128), torch.arange(0.0, 128))
    every = every[every.sum(1) <= SUM_LIMIT]
    for row, found in zip(position, bound, strict=True):
        if row.round().abs().sum() > SUM_LIMIT:
            best = (every - row.abs()).square().sum(1).min()
            torch.testing.assert_close((found - row).square().sum(), best, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(observer='MinMaxObserver'),
        dict(observer='PercentileObserver'),
        dict(symmetric=False),
        dict(num_channels=None),
        dict(bits=7, symmetric=False),
        dict(narrow_range=True),
    ],
)
@pytest.mark.parametrize('channels,kernel', [(16, (3, 3)), (3, (3, 3)), (1, (3, 3))])
def test_codes_values_and_gradients_agree(channels, kernel, options):
    options, neighbours, rows = dict(options), Neighbours(channels, kernel), 8
    observer = options.pop('observer', None)
    made = quantizer(rows, neighbours, **options)
    weight = torch.randn(rows, neighbours.size)
    weight[1] = weight[1].abs() + 1  # all of one sign, nearly alike
    weight[2] = 0
    made.fit_weight(
        weight,
        observer and build_observer(dict(type=observer, num_channels=made.num_channels, channel_axis=0)),
        importance=None,
    )
    codes = made.encode(weight)
    levels = codes - made.zero_point.reshape(-1, 1)
    assert neighbours.largest_sum(levels.float()).max() <= SUM_LIMIT
    learned = weight.clone().requires_grad_()
    values = made(learned)
    assert torch.equal(values, made.decode(codes))
    with torch.no_grad():
        assert torch.equal(made(weight), values) and torch.equal(made.encode(values), codes)
    values.sum().backward()
    assert torch.isfinite(learned.grad).all() and torch.isfinite(made.scale.grad).all()
    if observer == 'MinMaxObserver':
        # nothing is clipped, so nothing is bound by more than rounding
        assert ((values - weight).abs() <= 1.0001 * made.positive_scale().reshape(-1, 1)).all()


def test_what_is_bound_has_the_gradient_of_what_is_clipped():
    neighbours = Neighbours(2)
    made = quantizer(1, neighbours)
    with torch.no_grad():
        made.scale.fill_(0.5)
    weight = torch.tensor([[50.2, 30.4]], requires_grad=True)  # levels 100 and 61
    values = made(weight)
    assert values.tolist() == [[42.0, 22.0]]  # (128 + 100.4 - 60.8) / 2 = 83.8, so 84 and 44
    values.backward(torch.tensor([[1.0, 2.0]]))
    assert weight.grad.tolist() == [[0.0, 0.0]]
    # of what is clipped the scale's gradient is the level; LSQ's factor is 1 / sqrt(weights * highest level)
    torch.testing.assert_close(made.scale.grad, torch.tensor([(84 + 2 * 44) / (2 * 127) ** 0.5]))


def test_only_channels_that_exceed_the_limit_get_a_larger_scale():
    neighbours, rows = Neighbours(16, (3, 3)), 32
    weight = torch.randn(rows, neighbours.size)
    # neighbours of different signs
    signs = torch.ones(16, 9)
    signs[1::2] = -1
    weight[:16] = weight[:16].abs() * signs.flatten()
    free, bound = quantizer(rows, None), quantizer(rows, neighbours)
    for made in (free, bound):
        made.fit_weight(weight)
    assert torch.equal(free.scale[:16], bound.scale[:16])
    wider = bound.scale[16:] / free.scale[16:]
    assert (wider > 1.05).float().mean() > 0.5 and (wider < 2).all()
    assert torch.equal(free(weight)[:16], bound(weight)[:16])

    def decibels(made):
        return 10 * torch.log10(weight[16:].square().sum() / (made(weight) - weight)[16:].square().sum())

    seven = quantizer(rows, None, bits=7)
    seven.fit_weight(weight)
    assert decibels(free) - 3 < decibels(bound) < decibels(free)
    assert decibels(bound) > decibels(seven) + 2


@pytest.mark.parametrize('channels,kernel', [(16, (3, 3)), (3, (3, 3))])
def test_learned_rounding_stays_within_the_limit(channels, kernel):
    neighbours = Neighbours(channels, kernel)
    made, weight = quantizer(8, neighbours), torch.randn(8, neighbours.size)
    made.fit_weight(weight)
    for rounding in (torch.ones_like(weight), torch.randint(2, weight.shape).float()):
        codes = made.encode(weight, rounding)
        assert neighbours.largest_sum(codes.float()).max() <= SUM_LIMIT
        assert torch.equal(made(weight, rounding), made.decode(codes))
    relaxed = torch.rand(weight.shape, requires_grad=True)
    values = made(weight, relaxed)
    values.sum().backward()
    assert neighbours.largest_sum((values / made.scale[:, None]).detach()).max() <= SUM_LIMIT + 1e-3
    assert torch.isfinite(relaxed.grad).all() and relaxed.grad.any()


def test_the_spec_gives_the_same_again():
    neighbours = Neighbours(12, (3, 3), slices=4)
    made = quantizer(4, neighbours)
    again = build_quantizer(made.spec())
    again.load_state_dict(made.state_dict())
    assert again.spec() == made.spec() and all_pairs(again.neighbours) == all_pairs(neighbours)
    assert 'neighbours' not in quantizer(4, None).spec()  # as older versions wrote it


@pytest.mark.parametrize(
    'bits,location', [(2, 'zero'), (3, 'auto'), (4, 'zero'), (4, 'median'), (6, 'zero'), (8, 'zero')]
)
def test_log_affine_tables_end_where_any_two_fit(bits, location):
    weight = torch.distributions.Laplace(0.1, 1.0).sample((16, 300))
    wide, safe = (LogAffineQuantizer(bits, 16, location=location, table_max=most) for most in (127, 64))
    for made in (wide, safe):
        made.fit_weight(weight)
    levels, scale = safe.integer_levels()
    assert levels.abs().max() == SUM_LIMIT // 2 and wide.integer_levels()[0].abs().max() == 127
    codes = safe.encode(weight)
    # above 4 bits neighbouring codes may share an integer
    assert torch.equal(safe(weight), safe.decode(codes)) and torch.equal(safe(safe(weight)), safe(weight))
    rows = levels.expand(16, -1).gather(1, codes.long()) * scale[:, None]
    torch.testing.assert_close(rows, safe(weight).detach())
    noise = [(made(weight) - weight).square().sum() for made in (wide, safe)]
    # up to 4 bits the levels are far apart; 8 bits are hardly more than the 129 integers
    assert noise[1] < (1.1 if bits <= 4 else 1.6 if bits == 6 else 8) * noise[0]
    assert build_quantizer(safe.spec()).spec() == safe.spec() and 'table_max' not in wide.spec()


@pytest.mark.parametrize('table_max', [64, 127])
def test_the_published_grid_has_no_zero(table_max):
    made = LogAffineQuantizer(4, 16, mode='shift', location='zero', table_max=table_max)
    made.fit_weight(torch.distributions.Laplace(0.0, 1.0).sample((16, 300)))
    assert (made.table() != 0).all() and (made.table().int().diff() >= 0).all()


def test_other_table_ends_are_refused():
    with pytest.raises(PTQError, match='`table_max` must be 64 or 127, got 100'):
        LogAffineQuantizer(4, 16, table_max=100)
