import numpy as np
import pytest

from mmdet_ptq.analysis.weight_grids import weight_grids


def test_affine_grid_is_the_integers(tiny):
    grids = weight_grids(tiny.detector, tiny.structure, count=3)
    assert len(grids) == 3
    assert [g.sqnr_db for g in grids] == sorted(g.sqnr_db for g in grids)
    for grid in grids:
        assert grid.format == '8-bit affine' and grid.step == 4
        assert grid.levels == pytest.approx(np.arange(-128, 128, 4) / 128)
        assert len(grid.weights) == next(x.numel for x in tiny.structure.layers if x.name == grid.layer)


def test_log_affine_layers_come_first_with_all_their_levels(quantized_with):
    tiny = quantized_with(
        weights=dict(bits=4),
        head=dict(weights=dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer', location='zero'))),
    )
    grids = weight_grids(tiny.detector, tiny.structure)
    in_head = [g for g in grids if g.layer.startswith('bbox_head')]
    assert in_head == grids[: len(in_head)] and in_head
    for grid in in_head:
        assert grid.format == '4-bit log-affine' and grid.step == 1 and len(grid.levels) == 16
        gaps = np.diff(grid.levels)
        assert gaps[0] > 1.5 * gaps[6], 'wide steps in the tails'
        assert np.abs(grid.levels).max() == pytest.approx(1, abs=0.01)


def test_sixteen_bits_are_thinned(quantized_with):
    tiny = quantized_with(weights=dict(bits=16))
    grid = weight_grids(tiny.detector, tiny.structure, count=1)[0]
    assert len(grid.levels) == 64 and grid.step == 1024


def test_nothing_quantized(tiny):
    assert weight_grids(tiny.original, tiny.structure) == []


def test_the_weights_are_those_of_float_with_all_that_preparing_multiplied(quantized_with):
    """Normalisations are folded, channels of inputs divided: what the quantizer saw, not what the checkpoint holds."""
    tiny = quantized_with(activations=dict(bits=4, scale_migration=1.0))
    assert tiny.structure.folds and any(entry.divided for entry in tiny.structure.activations.values())
    behind = weight_grids(tiny.detector, tiny.structure, count=50)
    ours = weight_grids(tiny.detector, tiny.structure, count=50, float_detector=tiny.original)
    assert [grid.layer for grid in ours] == [grid.layer for grid in behind]
    for grid, other in zip(ours, behind, strict=True):
        np.testing.assert_allclose(grid.weights, other.weights, rtol=1e-4, atol=1e-6)
        assert grid.sqnr_db == pytest.approx(other.sqnr_db, abs=0.01)
