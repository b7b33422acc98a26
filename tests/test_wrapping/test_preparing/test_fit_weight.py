"""Which weights keep the bound on sums of neighbours."""

import pytest
from torch import nn

from mmdet_ptq.config import PTQConfig, TensorConfig
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer, Neighbours
from mmdet_ptq.registry import QUANTIZERS
from mmdet_ptq.wrapping.preparing.fit_weight import fit_weight_quantizer
from mmdet_ptq.wrapping.watching.layers import RowLayout, neighbours

LOG = dict(type='mmdet_ptq.LogAffineQuantizer')
AUTO = dict(type='mmdet_ptq.LogAffineQuantizer', mode='auto')
ASYMMETRIC = dict(type='mmdet_ptq.AffineQuantizer', symmetric=False)


@pytest.fixture
def own_classes():
    class Own(AffineQuantizer):
        pass

    class OwnArguments(AffineQuantizer):
        def __init__(self, bits=8, symmetric=True, num_channels=None, channel_axis=0):
            super().__init__(bits, symmetric, num_channels, channel_axis)

    for cls in (Own, OwnArguments):
        QUANTIZERS.register_module(module=cls)
    yield
    for cls in (Own, OwnArguments):
        QUANTIZERS.module_dict.pop(cls.__name__)


@pytest.mark.parametrize(
    'change,bound',
    [
        (dict(), True),
        (dict(bits=7), False),
        (dict(bits=7, quantizer=ASYMMETRIC), True),
        (dict(bits=4), False),
        (dict(saturation='ignore'), False),
        (dict(bits=16), False),
        (dict(bits=8, quantizer=AUTO), True),
        (dict(quantizer=dict(type='Own', symmetric=True, channel_axis=0)), True),
        (dict(quantizer=dict(type='OwnArguments')), False),
    ],
)
def test_affine_weights_of_eight_bits_are_bounded(own_classes, change, bound):
    layer = nn.Conv2d(6, 8, 3)
    # uniform weights: a uniform grid has the least error
    rows = RowLayout.of(layer).to_rows(layer.weight.detach())
    quantizer = fit_weight_quantizer(TensorConfig(**change), rows, neighbours(layer))
    assert isinstance(quantizer, AffineQuantizer) and (quantizer.neighbours is not None) == bound
    if bound:
        levels = quantizer.encode(rows) - quantizer.zero_point.reshape(-1, 1)
        assert Neighbours(6, (3, 3)).largest_sum(levels.float()).max() <= 128


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('saturation,most', [('safe', 64), ('ignore', 127)])
def test_log_affine_tables_end_by_the_key(bits, saturation, most):
    layer = nn.Conv2d(6, 8, 3)
    rows = RowLayout.of(layer).to_rows(layer.weight.detach())
    quantizer = fit_weight_quantizer(
        TensorConfig(bits=bits, quantizer=LOG, saturation=saturation), rows, neighbours(layer)
    )
    assert isinstance(quantizer, LogAffineQuantizer) and quantizer.integer_levels()[0].abs().max() == most


def test_a_table_of_the_config_stays():
    layer = nn.Conv2d(6, 8, 3)
    rows = RowLayout.of(layer).to_rows(layer.weight.detach())
    policy = TensorConfig(bits=4, quantizer={**LOG, 'table_max': 127})
    assert fit_weight_quantizer(policy, rows, neighbours(layer)).table_max == 127


@pytest.mark.parametrize(
    'layer,channels,kernel,slices',
    [
        (nn.Conv2d(6, 8, 3, groups=2), 3, [3, 3], 1),
        (nn.Linear(5, 7), 5, [], 1),
        (nn.Conv1d(6, 8, 5), 6, [5], 1),
        (nn.ConvTranspose2d(4, 6, 2), 4, [2, 2], 1),
        (nn.Conv2d(12, 8, 3), 12, [3, 3], 4),
        (nn.Conv2d(12, 12, 3, groups=2), 6, [3, 3], 1),
        (nn.Conv2d(4, 8, 3, groups=4), 1, [3, 3], 1),
    ],
)
def test_neighbours_of_layers(layer, channels, kernel, slices):
    assert neighbours(layer) == dict(channels=channels, kernel=kernel, slices=slices)
    rows = RowLayout.of(layer).to_rows(layer.weight.detach())
    assert rows.shape[1] == Neighbours(channels, kernel, slices).size


def test_depthwise_layers_have_none():
    assert neighbours(nn.Conv2d(8, 8, 3, groups=8)) is None
    layer = nn.Conv2d(8, 8, 3, groups=8)
    quantizer = fit_weight_quantizer(TensorConfig(), layer.weight.detach().flatten(1), neighbours(layer))
    assert quantizer.neighbours is None and quantizer.encode(layer.weight.detach().flatten(1)).abs().max() > 100


def test_the_key_reaches_every_policy():
    cfg = PTQConfig.from_dict(
        dict(
            preset='w8a8',
            saturation='ignore',
            weights=dict(bits=8),
            head=dict(weights=dict(saturation='safe')),
            overrides={'backbone': dict(weights=dict(saturation='safe'))},
        )
    )
    assert cfg.weights.saturation == 'ignore' and cfg.head['weights']['saturation'] == 'safe'
    with pytest.raises(Exception, match='`ptq.activations.saturation` means nothing'):
        PTQConfig.from_dict(dict(preset='w8a8', activations=dict(saturation='ignore')))
