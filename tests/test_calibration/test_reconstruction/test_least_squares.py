import pytest
import torch
from torch import nn

from mmdet_ptq.calibration.reconstruction.least_squares import (
    LayerEquations,
    NearestLevel,
    NeighbourSums,
    by_group,
    levels_of,
    patches,
)
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import SUM_LIMIT, AffineQuantizer, LogAffineQuantizer, Neighbours
from mmdet_ptq.wrapping.watching.layers import RowLayout

LAYERS = [
    lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    lambda: nn.Conv2d(4, 6, (1, 3), dilation=2, bias=False),
    lambda: nn.Conv2d(6, 6, 3, groups=6, padding=2, dilation=2),
    lambda: nn.Conv2d(4, 6, 3, groups=2),
    lambda: nn.Linear(5, 7),
]


@pytest.mark.parametrize('make', LAYERS)
def test_rows_times_patches_is_the_layer(make):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(2, 9, 5) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 9, 8)
    reads, expected = patches(layer, x), by_group(layer, layer(x))
    rows = RowLayout.of(layer).to_rows(layer.weight).view(len(reads), -1, reads.shape[1])
    found = rows @ reads
    if layer.bias is not None:
        found = found + layer.bias.view(len(reads), -1, 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('make', LAYERS)
def test_picked_positions_are_those_of_the_whole(make):
    layer = make()
    x = torch.randn(2, 9, 5) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 9, 8)
    whole = patches(layer, x)
    picked = torch.randperm(whole.shape[2])[:7]
    assert torch.equal(patches(layer, x, picked), whole[..., picked])


@pytest.mark.parametrize(
    'layer',
    [
        nn.ConvTranspose2d(3, 3, 2),
        nn.Conv1d(3, 3, 1),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode='reflect'),
        nn.Conv2d(3, 3, 3, padding='same'),
    ],
)
def test_layers_that_are_not_covered(layer):
    assert patches(layer, torch.randn(2, 3, 8, 8)) is None


def make_equations(has_bias=True, groups=2, rows=3, fan_in=6, positions=400):
    torch.manual_seed(0)
    mix = torch.randn(groups, fan_in, fan_in)
    x = mix @ torch.randn(groups, fan_in, positions) + 2
    weight, bias = torch.randn(groups, rows, fan_in), torch.randn(groups, rows) * has_bias
    y = weight @ x + bias[..., None]
    noisy = x + 0.3 * torch.randn_like(x)
    equations = LayerEquations(groups, rows, fan_in, has_bias, x.device)
    equations.add(noisy[..., :150], y[..., :150])
    equations.add(noisy[..., 150:], y[..., 150:])
    return equations, weight, bias, noisy, y


@pytest.mark.parametrize('has_bias', [True, False])
def test_least_squares(has_bias):
    equations, weight, bias, x, y = make_equations(has_bias)
    solved, offset = equations.solve(weight, bias, 1e-9)
    for g in range(2):
        design = torch.cat([x[g], x.new_ones(1, x.shape[2])]) if has_bias else x[g]
        expected = torch.linalg.lstsq(design.T.double(), y[g].T.double()).solution.T
        torch.testing.assert_close(solved[g].double(), expected[:, :6], rtol=1e-3, atol=1e-3)
    if has_bias:
        torch.testing.assert_close((solved @ x + offset[..., None]).mean(-1), y.mean(-1), rtol=1e-3, atol=1e-3)
    else:
        assert (offset == 0).all() and (equations.best_bias(solved) == 0).all()
    held, _ = equations.solve(weight, bias, 1e9)
    torch.testing.assert_close(held, weight, rtol=1e-3, atol=1e-3)


def test_compensated_rounding_beats_rounding_to_the_nearest():
    equations, weight, bias, x, y = make_equations()
    solved, _ = equations.solve(weight, bias, 1e-3)
    quantizer = AffineQuantizer(3, True, 6, 0)
    quantizer.fit_weight(solved.view(6, 6))

    def quantize(column):
        return quantizer(column.reshape(6, 1)).detach().view(2, 3)

    rounded, error = equations.rounding(solved, 1e-3)(quantize)
    nearest = quantizer(solved.reshape(6, 6)).detach().view(2, 3, 6)
    # on the grid
    torch.testing.assert_close(quantizer(rounded.reshape(6, 6)).detach().view(2, 3, 6), rounded)
    errors = [((w @ x + equations.best_bias(w)[..., None] - y) ** 2).mean().item() for w in (rounded, nearest, solved)]
    assert errors[0] - errors[2] < 0.6 * (errors[1] - errors[2])
    residual = (rounded @ x + equations.best_bias(rounded)[..., None] - y).mean(-1)
    assert residual.abs().max() < 1e-2
    # the error that is told is that of the positions, up to the damping
    told = error.sum() / x.shape[2] / 6
    torch.testing.assert_close(told.float(), torch.tensor(errors[0] - errors[2]), rtol=0.05, atol=0)


def test_without_rounding_nothing_is_compensated():
    equations, weight, *_ = make_equations()
    rounded, error = equations.rounding(weight, 1e-2)(lambda column: column)
    torch.testing.assert_close(rounded, weight)
    assert error.abs().max() < 1e-3


def test_blocks_of_columns_change_nothing(monkeypatch):
    equations, weight, *_ = make_equations()
    whole = equations.rounding(weight, 1e-2)(torch.round)[0]
    monkeypatch.setattr('mmdet_ptq.calibration.reconstruction.least_squares.BLOCK', 2)
    assert torch.equal(equations.rounding(weight, 1e-2)(torch.round)[0], whole)


def test_coordinate_descent_never_raises_the_error():
    equations, weight, *_ = make_equations(fan_in=20)
    errors = [equations.rounding(weight, 1e-2)(torch.round, sweeps=sweeps)[1] for sweeps in range(3)]
    assert (errors[1] <= errors[0]).all() and (errors[2] <= errors[1]).all()
    assert errors[1].sum() < errors[0].sum()


def test_importance_is_the_mean_square_of_the_inputs():
    equations, _, _, x, _ = make_equations()
    torch.testing.assert_close(equations.importance(), x.square().mean(2), rtol=1e-4, atol=1e-4)


def test_an_input_that_is_always_zero_is_no_trouble():
    equations = LayerEquations(1, 2, 3, True, torch.device('cpu'))
    x = torch.randn(1, 3, 50)
    x[:, 1] = 0
    weight = torch.randn(1, 2, 3)
    equations.add(x, weight @ x)
    solved, _ = equations.solve(weight, torch.zeros(1, 2), 1e-2)
    torch.testing.assert_close(solved, weight, rtol=1e-2, atol=1e-2)
    assert torch.isfinite(equations.rounding(solved, 1e-2)(torch.round)[0]).all()


@pytest.mark.parametrize(
    'quantizer',
    [
        AffineQuantizer(3, True, 6, 0),
        AffineQuantizer(4, False, None),
        LogAffineQuantizer(4, 6, location='median'),
        LogAffineQuantizer(2, 6, location='zero'),
        LogAffineQuantizer(8, 6, location='median'),
    ],
    ids=str,
)
def test_the_nearest_level_is_the_nearest_value_that_is_rounded_to_itself(quantizer):
    weight = torch.distributions.Laplace(0.02, 0.1).sample((6, 50))
    weight[2] = 0.0
    quantizer.fit_weight(weight)
    low, high = quantizer.code_range
    levels = quantizer.decode(torch.arange(low, high + 1, dtype=torch.int32).expand(6, -1)).detach()
    stored = (quantizer(levels) == levels).detach()
    distance = (weight[..., None] - levels[:, None]).abs().masked_fill(~stored[:, None], torch.inf).amin(2)
    nearest = NearestLevel(levels_of(quantizer, 6))
    for column in range(50):
        value = nearest(weight[:, column].view(2, 3))
        assert torch.equal(quantizer(value.reshape(6, 1)).view(2, 3), value)
        torch.testing.assert_close((value.flatten() - weight[:, column]).abs(), distance[:, column])


def test_a_grid_whose_values_cannot_be_stored_is_refused():
    class Moving(AffineQuantizer):
        def forward(self, x):
            return x + 1

    quantizer = Moving(3, True, 6, 0)
    quantizer.fit_weight(torch.randn(6, 5))
    with pytest.raises(PTQError, match='rounds none of its values to itself'):
        levels_of(quantizer, 6)


@pytest.mark.parametrize('channels,kernel,groups', [(6, (3, 3), 2), (3, (3, 3), 1), (8, (), 1), (1, (3, 3), 2)])
def test_compensated_rounding_keeps_neighbours_within_their_sum(channels, kernel, groups):
    neighbours, rows = Neighbours(channels, kernel), 5
    equations, weight, *_ = make_equations(True, groups, rows, neighbours.size)
    # neighbours of one sign, all large
    weight = weight.abs() + 2
    flat = weight.reshape(groups * rows, -1)
    quantizer = AffineQuantizer(8, True, groups * rows, 0, neighbours=neighbours.spec())
    # so narrow that rounding alone would exceed the sum everywhere
    with torch.no_grad():
        quantizer.scale.copy_(flat.amax(1) / 127)
    round_on_grid, nearest = equations.rounding(weight, 0.01), NearestLevel(levels_of(quantizer, groups * rows))
    sums = NeighbourSums(neighbours, quantizer.scale.detach().view(groups, rows))
    free, free_error = round_on_grid(nearest)
    bound, error = round_on_grid(nearest, sums)

    def largest(values):
        return neighbours.largest_sum((values.reshape(groups * rows, -1) / quantizer.scale[:, None]).round()).max()

    assert largest(free) > SUM_LIMIT >= largest(bound)
    # it is on the grid as it is: storing it changes nothing
    assert torch.equal(quantizer(bound.reshape(groups * rows, -1)).view(bound.shape), bound)
    # what the bound takes, the other weights make up for: less is lost than by cutting what was rounded freely
    cut = quantizer(free.reshape(groups * rows, -1)).detach().view(free.shape)
    change = (cut - weight).double()
    cut_error = ((change @ equations._hessian(0.01)) * change).sum(2)
    assert (free_error <= error + 1e-9).all() and error.sum() < cut_error.sum()


def test_columns_hear_of_their_neighbours_in_any_order():
    neighbours = Neighbours(4)  # pairs (0, 1) and (2, 3)
    sums = NeighbourSums(neighbours, torch.full((1, 1), 0.5))  # the limit is 64
    start = torch.tensor([[[20.0, 30.0, 0.0, 60.0]]], dtype=torch.float64)
    beside = sums.of(torch.tensor([[3, 0, 2, 1]]), start)

    def clip(column, value):
        return float(beside.clip(column, torch.tensor([[value]], dtype=torch.float64)))

    # column 2 comes later and is 0 so far, column 3 is 60: both go half of the way
    assert clip(0, 60.0) == 60 and clip(0, 100.0) == 64 and clip(1, 30.0) == 17 and clip(1, -30.0) == -30
    beside.put(0, torch.tensor([[50.0]]))
    beside.put(1, torch.tensor([[-60.0]]))
    assert clip(2, 100.0) == 14 and clip(2, -100.0) == -64
    assert clip(3, 100.0) == 64 and clip(3, -100.0) == -4
    beside.put(2, torch.tensor([[10.0]]))
    beside.put(3, torch.tensor([[-3.0]]))
    beside.complete()
    assert clip(0, 60.0) == 54 and clip(1, -64.0) == -61


@pytest.mark.parametrize('bound', [False, True])
def test_grids_side_by_side_are_those_one_after_another(bound):
    groups, rows, neighbours = 2, 5, Neighbours(3, (3, 3))
    equations, weight, *_ = make_equations(True, groups, rows, neighbours.size)
    flat, scales = weight.reshape(groups * rows, -1), []
    round_on_grid, levels, alone = equations.rounding(weight, 0.01), [], []
    for factor in (1.0, 0.4, 1.3):
        quantizer = AffineQuantizer(4, True, groups * rows, 0)
        with torch.no_grad():
            quantizer.scale.copy_(factor * flat.abs().amax(1) / 7)
        # so that the sums are bounded at 4 bits, too
        scales.append((quantizer.scale.detach() / 16).view(groups, rows))
        levels.append(levels_of(quantizer, groups * rows).detach())
        sums = NeighbourSums(neighbours, scales[-1]) if bound else None
        alone.append(round_on_grid(NearestLevel(levels[-1]), sums))
    stacked = torch.cat([grid.view(groups, rows, -1) for grid in levels], 1).flatten(0, 1)
    sums = NeighbourSums(neighbours, torch.cat(scales, 1)) if bound else None
    found = round_on_grid(NearestLevel(stacked), sums, 3)
    for (rounded, error), one, of_one in zip(alone, *(part.chunk(3, 1) for part in found), strict=True):
        assert torch.equal(one, rounded)
        torch.testing.assert_close(of_one, error)
    if bound:
        free = round_on_grid(NearestLevel(stacked), None, 3)[0]
        assert not torch.equal(found[0], free)
