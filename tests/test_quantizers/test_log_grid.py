"""The arithmetic of log-affine grids: each function against its formula, tables and codes against each other."""

import math

import numpy as np
import pytest
import torch

from mmdet_ptq.quantizers import log_grid

MODES = ['log1p', 'exact', 'shift']
SIDES = torch.tensor([2.5, 1.75]), torch.tensor([1.5, 0.625])


def grid(mode, bits=4, **options):
    return log_grid.Grid(mode, 2 ** (bits - 1), *SIDES, **options)


@pytest.mark.parametrize('mode', MODES)
def test_magnitudes_are_decoded_by_the_published_formulas(mode):
    k, offset = (side.double() for side in SIDES)
    y = torch.linspace(0.5, 7.5, 15, dtype=torch.float64)[:, None]
    formula = dict(
        log1p=lambda y, k, offset: offset * (2 ** (y / k) - 1),
        exact=lambda y, k, offset: 2 ** ((y - offset) / k),
        shift=lambda y, k, offset: 2 ** (y - offset),
    )[mode]
    decoded = log_grid.inverse(mode, y, k, offset)
    np.testing.assert_allclose(decoded, formula(y.numpy(), k.numpy(), offset.numpy()), rtol=1e-12)
    if mode != 'shift':  # which leaves k out
        torch.testing.assert_close(log_grid.psi(mode, decoded, k, offset), y.expand(-1, 2), rtol=1e-12, atol=0)
    levels = log_grid.levels(mode, *SIDES, 8)
    assert torch.equal(levels, log_grid.inverse(mode, torch.arange(8.0).double() + 0.5, k[:, None], offset[:, None]))
    step = 1e-6
    ends = [log_grid.inverse(mode, y + sign * step, k, offset) for sign in (1, -1)]
    slope = log_grid.slope(mode, decoded, k, offset)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=0)


@pytest.mark.parametrize('mode', MODES[:2])
@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
def test_every_level_of_the_table_has_its_own_code_or_shares_its_value(mode, bits):
    k, offset = log_grid.initial_side(mode, bits)
    ends = torch.tensor([offset, offset]) + (torch.tensor([0.2, -0.1]) if mode == 'exact' else torch.tensor([0.1, 0.0]))
    made = log_grid.Grid(mode, 2 ** (bits - 1), torch.tensor([k * 1.1, k * 0.9]), ends)
    codes = torch.arange(2**bits)
    levels = made.value(codes, None, torch.ones(()))
    assert torch.equal(made.value(made.encode(levels), None, torch.ones(())), levels)
    alone = torch.ones(2**bits, dtype=torch.bool)
    alone[1:] &= made.table.int().diff() != 0
    alone[:-1] &= made.table.int().diff() != 0
    # zero stands on one side of the location alone
    alone &= made.table != 0
    assert torch.equal(made.encode(levels)[alone], codes[alone].int()) and alone.sum() > 2**bits / 4


def test_the_table_ascends_to_the_integer_that_it_may_hold():
    for table_max in (127, 64):
        table = grid('log1p', table_max=table_max).table
        level = log_grid.levels('log1p', *SIDES, 8)
        expected = np.rint(level.numpy() / level.max().item() * table_max)
        np.testing.assert_array_equal(table, np.concatenate([-expected[1, ::-1], expected[0]]))
        assert table.dtype == torch.int8 and table.int().abs().max() == table_max
    # half a step of the published format is no zero
    least = log_grid.levels('shift', *SIDES, 8)[:, 0] / log_grid.levels('shift', *SIDES, 8).max() * 64
    assert (least.round() == 0).any() and grid('shift', table_max=64).table[7:9].tolist() == [-1, 1]


def test_an_edge_gives_way_to_levels_that_were_rounded_out_of_their_bins():
    one, level = torch.ones(2), torch.tensor([[1.0, 2.0, 4.0, 8.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    # 2^c - 1, within the middle half of the gap
    assert log_grid.edges('log1p', one, one, level).tolist() == [[1.25, 3, 7], [2, 2, 2]]
    # 2^(c - 1), whatever the levels are
    assert log_grid.edges('shift', one, one, level).tolist() == [[1, 2, 4], [1, 2, 4]]


def test_a_code_tells_its_side_and_its_magnitude():
    made, codes = grid('log1p', 3), torch.arange(8, dtype=torch.int32)
    minus = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.int32)
    magnitudes = torch.tensor([3, 2, 1, 0, 0, 1, 2, 3], dtype=torch.int32)
    assert torch.equal(made.magnitude_code(minus, codes), magnitudes)
    assert torch.equal(made.code(minus, magnitudes), codes)
    d = torch.tensor([-100.0, -1e-30, -0.0, 0.0, 1e-30, 100.0])
    assert made.encode(d).tolist() == [0, 3, 4, 4, 4, 7] and log_grid.sign_bit(d).tolist() == [1, 1, 0, 0, 0, 0]
    assert torch.equal(made.side_params(minus)[0], SIDES[0][minus.long()])


def test_around_a_location_levels_lie_on_a_grid_through_zero():
    made = grid('log1p')
    mu, size = torch.tensor([[0.75], [-3.0], [0.0]]), torch.tensor([[0.5], [0.125], [0.0]])
    integers, scale = made.integer_levels(mu, size)
    exact = mu + size * made.step * made.table
    assert torch.equal(integers, integers.round()) and integers[:2].abs().amax(1).tolist() == [127, 127]
    assert ((integers * scale - exact).abs() <= 0.501 * scale).all()
    # a channel of a single value, zero, has a scale by which nothing is divided
    assert (integers[2] == 0).all() and scale[2] == 1
    codes = torch.randint(0, 16, (3, 9), dtype=torch.int32)
    assert torch.equal(made.value(codes, mu, size), (integers * scale).gather(1, codes.long()))


def test_the_bins_of_the_search_keep_every_weight_and_its_magnitude():
    torch.manual_seed(0)
    d, weight = torch.randn(3, 500) * 4, torch.rand(3, 500)
    weights, sums = log_grid.side_histogram(d, weight)
    for side, here in enumerate((d >= 0, d < 0)):
        assert weights[side].sum().item() == pytest.approx(weight[here].double().sum().item(), rel=1e-6)
        mean = (sums[side] / weights[side])[weights[side] > 0]
        assert (mean.diff() > 0).all() and mean[0] >= 0.999 * d[here].abs().min() and mean[-1] <= 1.001 * d.abs().max()
    # 64 bins an octave: each is 1.1 % wide
    assert (log_grid.side_histogram(torch.tensor([[1.001, 1.005, 1.02]]), torch.ones(1, 3))[0] > 0).sum() == 2
    zero = log_grid.side_histogram(torch.zeros(1, 4), torch.ones(1, 4))
    assert zero[0].sum() == 4 and zero[1].sum() == 0


@pytest.mark.parametrize('mode', MODES)
def test_a_refined_side_is_no_worse_and_knows_the_grid_that_the_weights_lie_on(mode):
    k, offset = log_grid.initial_side(mode, 4)
    if mode != 'log1p':  # the top level is four mean magnitudes
        top = log_grid.inverse(mode, torch.tensor(7.5), torch.tensor(k), torch.tensor(offset))
        assert top.item() == pytest.approx(4, rel=1e-6)
    on_grid = log_grid.inverse(
        mode, torch.arange(8.0).double() + 0.5, *(torch.tensor([v]).double() for v in (k, offset))
    )
    other = on_grid * 1.3

    def error(magnitude, k, offset):
        k, offset = (torch.tensor([v]).double() for v in (k, offset))
        y = log_grid.psi(mode, magnitude, k, offset).floor().clamp(0, 7) + 0.5
        return (log_grid.inverse(mode, y, k, offset) - magnitude).square().sum().item()

    weight = torch.ones(8, dtype=torch.float64)
    found = log_grid.refine_side(mode, on_grid, weight, k, offset, 8, 0.5)
    assert found == pytest.approx((k, offset)) or error(on_grid, *found) < 1e-20
    found = log_grid.refine_side(mode, other, weight, k, offset, 8, 0.5)
    assert error(other, *found) < error(other, k, offset) and all(map(math.isfinite, found))
    assert log_grid.refine_side(mode, other[:0], weight[:0], k, offset, 8, 0.5) == (k, offset)
