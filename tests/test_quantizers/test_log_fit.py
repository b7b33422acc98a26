"""Fitting log-affine grids: what the search starts from, finds again, and must not depend on."""

import pytest
import torch

from mmdet_ptq.quantizers import log_grid
from mmdet_ptq.quantizers.log_fit import fit_log_affine


def laplace(*shape):
    torch.manual_seed(0)
    return torch.distributions.Laplace(0.0, 1.0).sample(shape)


def error(matrix, fitted, mode='log1p', bits=4, factor=1.0, table_max=127):
    """Squared error of a fit, computed by the grid it describes."""
    mu, s, k, offset = fitted
    grid = log_grid.Grid(mode, 2 ** (bits - 1), k, offset, table_max)
    centred = matrix if mu is None else matrix - mu[:, None]
    code = grid.encode(centred / s[:, None])
    return (factor * (grid.value(code, None, s[:, None]) - centred).square()).sum().item()


@pytest.mark.parametrize('mode', ['log1p', 'exact', 'shift'])
def test_the_search_is_better_than_its_start(mode):
    matrix = laplace(3, 400) * torch.tensor([[1.0], [0.01], [30.0]])
    fitted = fit_log_affine(matrix, None, mode, 3, 'zero')
    mu, s, k, offset = fitted
    assert mu is None and s.shape == (3,) and k.shape == offset.shape == (2,)
    assert {part.dtype for part in fitted[1:]} == {torch.float32} and (s > 0).all() and (k > 0).all()
    start = (torch.full((2,), value) for value in log_grid.initial_side(mode, 3))
    assert error(matrix, fitted, mode, 3) < error(matrix, (None, matrix.abs().mean(1), *start), mode, 3)


def test_a_weight_of_another_size_gets_the_same_grid():
    matrix = laplace(2, 300) + torch.tensor([[2.0], [-1.0]])
    mu, s, k, offset = fit_log_affine(matrix, None, 'log1p', 4, 'median')
    # of a power of two, by which nothing is rounded otherwise
    scaled = fit_log_affine(matrix / 4, None, 'log1p', 4, 'median')
    assert torch.equal(scaled[0], mu / 4) and torch.equal(scaled[1], s / 4)
    torch.testing.assert_close(scaled[2:], (k, offset))
    assert torch.equal(mu, matrix.median(1).values)


@pytest.mark.parametrize(('bits', 'kept'), [(4, True), (5, False)])
def test_a_location_is_looked_for_up_to_four_bits(bits, kept):
    away = laplace(2, 100) * 0.1 + 3
    assert (fit_log_affine(away, None, 'log1p', bits, 'auto')[0] is not None) == kept
    assert fit_log_affine(away, None, 'log1p', bits, 'median')[0] is not None
    centred = laplace(2, 100)
    assert fit_log_affine(torch.cat([centred, -centred], 1), None, 'log1p', bits, 'auto')[0] is None


def test_what_does_not_matter_does_not_move_the_grid():
    matrix = laplace(2, 300)
    factor = torch.ones_like(matrix)
    plain = fit_log_affine(matrix, None, 'log1p', 3, 'zero')
    for ours, theirs in zip(fit_log_affine(matrix, factor, 'log1p', 3, 'zero')[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, theirs)
    factor[matrix.abs() < 1.5] = 0.01
    weighted = fit_log_affine(matrix, factor, 'log1p', 3, 'zero')
    assert error(matrix, weighted, bits=3, factor=factor) < error(matrix, plain, bits=3, factor=factor)
    assert error(matrix, plain, bits=3) < error(matrix, weighted, bits=3)


def test_a_channel_of_a_single_value_has_no_size_and_disturbs_no_other():
    matrix = laplace(3, 200)
    matrix[1] = 0
    s = fit_log_affine(matrix, None, 'log1p', 4, 'zero')[1]
    assert s[1] == 0 and torch.isfinite(s).all() and (s[[0, 2]] > 0).all()
    alone = fit_log_affine(matrix[[0, 2]], None, 'log1p', 4, 'zero')
    assert torch.equal(alone[1], s[[0, 2]])


def test_a_coarser_table_is_fitted_to():
    # two bits' worth of integers: the search must see the rounding of the table
    matrix = laplace(1, 600)
    fine, coarse = (fit_log_affine(matrix, None, 'log1p', 4, 'zero', table_max) for table_max in (127, 15))
    assert error(matrix, coarse, table_max=15) < error(matrix, fine, table_max=15)
    assert error(matrix, fine) < error(matrix, coarse)
