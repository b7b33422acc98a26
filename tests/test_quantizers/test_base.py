"""What every number format inherits: channels and their axis, weights as matrices, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer
from mmdet_ptq.quantizers.base import Quantizer, check_bits, check_finite


class Whole(Quantizer):
    """The least that a format of one's own gives: multiples of a step."""

    def __init__(self, num_channels=None, channel_axis=0):
        super().__init__(8, num_channels, channel_axis)
        self.step = nn.Parameter(torch.ones(self.param_shape))

    def forward(self, x, rounding=None):
        step = self.per_channel(self.step, x)
        return (x / step).round() * step

    def decode(self, codes):
        return codes * self.per_channel(self.step, codes)

    def step_size(self):
        return self.step.mean().item()

    def any_param(self):
        return self.step

    def spec(self):
        return dict(type='Whole', bits=self.bits, num_channels=self.num_channels)


@pytest.mark.parametrize('axis', [0, 1, 2, -1, -3])
def test_channels_lie_on_their_axis(axis):
    weight = torch.randn(2, 3, 4)
    channels = weight.shape[axis]
    quantizer, factor = Whole(channels, axis), torch.arange(1.0, channels + 1)
    rows = np.moveaxis(weight.numpy(), axis, 0).reshape(channels, -1)
    np.testing.assert_array_equal(quantizer.as_matrix(weight).numpy(), rows)
    scaled = (weight * quantizer.per_channel(factor, weight)).numpy()
    np.testing.assert_array_equal(np.moveaxis(scaled, axis, 0).reshape(channels, -1), rows * factor.numpy()[:, None])


def test_without_channels_a_weight_is_one_row():
    quantizer, weight = Whole(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    row = quantizer.as_matrix(weight)
    assert row.shape == (1, 6) and row.dtype == torch.float32 and not row.requires_grad
    assert quantizer.param_shape == () and Whole(5).param_shape == (5,)
    assert quantizer.per_channel(quantizer.step, weight) is quantizer.step


def test_importance_becomes_a_matrix_of_the_weights_shape():
    quantizer, weight = Whole(3, 1), torch.randn(2, 3, 4)
    assert quantizer.importance_matrix(None, weight) is None
    rows = quantizer.importance_matrix(torch.tensor([[1.0], [2.0], [3.0]]), weight)
    assert torch.equal(rows, torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 8))
    with pytest.raises(PTQError, match=r'`importance` of shape \(2,\) does not broadcast to .* shape \(2, 3, 4\)'):
        quantizer.importance_matrix(torch.ones(2), weight)
    with pytest.raises(PTQError, match='The importance to quantize holds NaN'):
        quantizer.importance_matrix(torch.tensor(torch.nan), weight)


def test_a_grid_is_widened_as_a_whole_or_channel_by_channel():
    quantizer = Whole(3)
    quantizer.rescale(torch.tensor(2.0))
    quantizer.rescale(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert quantizer.step.tolist() == [2, 4, 6] and quantizer.step.dtype == torch.float32
    # a format that tells no more has the same unit in every channel
    assert quantizer.step_sizes().tolist() == [4, 4, 4]


def test_a_value_inside_a_bin_and_the_nearest_are_the_formats_own_unless_it_says_otherwise():
    quantizer, x = Whole(), torch.tensor([0.4, -1.7], requires_grad=True)
    assert torch.equal(quantizer.inside_bin(torch.tensor([3, -2])), torch.tensor([3.0, -2.0]))
    assert quantizer.nearest(x).tolist() == [0, -2] and not quantizer.nearest(x).requires_grad
    assert not quantizer.has_zero_point and not quantizer.uniform and quantizer.style == 'own format'


def test_a_format_is_told_by_its_registered_name():
    assert AffineQuantizer.type_name() == 'mmdet_ptq.AffineQuantizer'
    assert LogAffineQuantizer().spec()['type'] == LogAffineQuantizer.type_name() == 'mmdet_ptq.LogAffineQuantizer'
    assert Whole.type_name() == 'mmdet_ptq.Whole'  # which is not registered
    assert repr(Whole(4)) == 'Whole(bits=8, num_channels=4)'


@pytest.mark.parametrize('count', [0, -2, True, 0.5])
def test_channels_are_counted_from_one(count):
    with pytest.raises(PTQError, match=f'`num_channels` must be a positive integer or None, got {count}'):
        Whole(count)


def test_what_is_no_number_or_no_choice_is_refused():
    check_finite(torch.tensor([1e38, -1e38]), 'weight')
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(PTQError, match='The weight to quantize holds NaN or infinity'):
            check_finite(torch.tensor([0.0, bad, 1.0]), 'weight')
    with pytest.raises(PTQError, match=r'The weight to quantize is empty \(shape \(0, 3\)\)'):
        check_finite(torch.zeros(0, 3), 'weight')
    check_bits(4, (2, 4), '2 or 4')
    for bits in (3, True, 4.0, '4'):
        with pytest.raises(PTQError, match=f'`bits` must be one of 2 or 4, got {bits!r}'):
            check_bits(bits, (2, 4), '2 or 4')
