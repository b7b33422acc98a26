import pytest
import torch

from mmdet_ptq.quantizers import AffineQuantizer, LearnedRounding, LogAffineQuantizer

QUANTIZERS = [
    lambda: AffineQuantizer(4, True, 3, 0),
    lambda: AffineQuantizer(3, False, 3, 0),
    *(
        lambda mode=mode, bits=bits: LogAffineQuantizer(bits, 3, mode)
        for mode, bits in [('log1p', 4), ('log1p', 3), ('log1p', 8), ('exact', 4), ('shift', 4)]
    ),
]


@pytest.fixture(params=QUANTIZERS)
def fitted(request):
    torch.manual_seed(0)
    quantizer, rows = request.param(), torch.distributions.Laplace(0.0, 1.0).sample((3, 200)) + 0.1
    quantizer.fit_weight(rows)
    return quantizer, rows


def test_the_start_is_the_float_weight_where_it_lies_between_two_codes(fitted):
    quantizer, rows = fitted
    if getattr(quantizer, 'mode', 'log1p') == 'shift':
        pytest.skip('the published grid does not invert psi')
    rounding = LearnedRounding(quantizer, rows)
    position = quantizer.code_position(rows)
    low, high = quantizer.code_range
    if isinstance(quantizer, LogAffineQuantizer):
        low, high = 0, quantizer.count - 1
    inside = (position.floor() >= low) & (position.floor() + 1 <= high) & (position != position.floor())
    assert inside.float().mean() > 0.5
    relaxed = quantizer(rows, rounding())
    torch.testing.assert_close(relaxed[inside], rows[inside], rtol=1e-3, atol=1e-3)


def test_the_regularizer_vanishes_where_everything_has_chosen(fitted):
    rounding = LearnedRounding(*fitted)
    assert rounding.regularizer(2.0) > 1
    rounding.v.data = torch.where(rounding.v > 0, 10.0, -10.0)
    assert rounding.regularizer(2.0) == 0
    assert torch.equal(rounding(), rounding.hard())
    half = LearnedRounding(*fitted)
    half.v.data.zero_()
    assert half.regularizer(2.0).item() == pytest.approx(half.v.numel())


def test_values_inside_a_bin_are_rounded_to_its_code(fitted):
    quantizer, rows = fitted
    codes = quantizer.encode(rows)
    again = quantizer.encode(quantizer.inside_bin(codes))
    # above 4 bits neighbouring codes may share a value
    assert torch.equal(quantizer.decode(again), quantizer.decode(codes))


def test_step_size_is_a_distance_of_neighbours(fitted):
    quantizer, rows = fitted
    values = quantizer.decode(torch.arange(quantizer.code_range[0], quantizer.code_range[1] + 1).expand(3, -1))
    gaps = values.diff(dim=1)
    assert gaps.min() <= quantizer.step_size() <= gaps.max()
