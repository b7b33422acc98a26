"""Formats are built before anything runs: what does not exist, or does not fit its tensor, is told with its key."""

import pytest

from mmdet_ptq.config import TensorConfig, check_format
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.registry import QUANTIZERS

AFFINE, LOG = 'mmdet_ptq.AffineQuantizer', 'mmdet_ptq.LogAffineQuantizer'


@pytest.fixture
def registered(monkeypatch):
    """Registers a class as a format until the test ends."""

    def register(kind):
        QUANTIZERS.import_from_location()
        monkeypatch.setitem(QUANTIZERS.module_dict, kind.__name__, kind)
        return TensorConfig(quantizer=dict(type=f'mmdet_ptq.{kind.__name__}'))

    return register


@pytest.mark.parametrize(
    ('part', 'policy'),
    [
        ('weights', TensorConfig(bits=4, quantizer=dict(type=LOG, mode='auto'))),
        ('weights', TensorConfig(bits=2, quantizer=dict(type=AFFINE, symmetric=True))),
        ('activations', TensorConfig(bits=16, observer=dict(type='mmdet_ptq.KLObserver'))),
    ],
)
def test_what_exists_and_fits_is_accepted(part, policy):
    check_format(policy, part, f'ptq.{part}')


@pytest.mark.parametrize(
    ('part', 'policy', 'told'),
    [
        ('weights', TensorConfig(bits=16, quantizer=dict(type=LOG)), '`key.quantizer`: `bits` must be one of 2..8'),
        ('activations', TensorConfig(quantizer=dict(type=LOG)), '`key.quantizer`: LogAffineQuantizer is a format of w'),
        ('activations', TensorConfig(quantizer=dict(type='Afine')), "`key.quantizer`: Unknown quantizer type 'Afine'"),
        ('weights', TensorConfig(observer=dict(type='KL')), "`key.observer`: Unknown observer type 'KL'"),
        ('weights', TensorConfig(observer=dict(type='KLObserver', percentile=9)), '`key.observer`: KLObserver has no'),
    ],
)
def test_what_does_not_is_told_with_its_key(part, policy, told):
    with pytest.raises(PTQError, match=f'^{told}'):
        check_format(policy, part, 'key')


def test_what_stays_float_may_name_anything():
    check_format(TensorConfig(float=True, bits=3, quantizer=dict(type='nothing'), observer={}), 'activations', 'key')


def test_weights_have_channels_and_activations_an_axis_for_them(registered):
    built = []

    class Own(AffineQuantizer):
        def __init__(self, bits=8, num_channels=None, channel_axis=0):
            built.append((bits, num_channels, channel_axis))
            super().__init__(bits, num_channels=num_channels, channel_axis=channel_axis)

    policy = registered(Own)
    check_format(policy, 'weights', 'key')
    check_format(policy, 'activations', 'key')
    assert built == [(8, 1, 0), (8, None, 1)]


def test_a_format_that_takes_whatever_it_is_given_may_be_one_of_activations(registered):
    class Any(AffineQuantizer):
        def __init__(self, **options):
            super().__init__(**options)

    class WeightsAlone(AffineQuantizer):
        def __init__(self, bits=8, num_channels=None):
            super().__init__(bits, num_channels=num_channels)

    check_format(registered(Any), 'activations', 'key')
    policy = registered(WeightsAlone)
    check_format(policy, 'weights', 'key')
    with pytest.raises(PTQError, match='WeightsAlone is a format of weights; activations take mmdet_ptq.AffineQuanti'):
        check_format(policy, 'activations', 'key')
