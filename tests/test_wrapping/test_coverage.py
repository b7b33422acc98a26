"""The coverage table and the costs that are counted from it, by hand."""

import pytest
import torch
from torch import nn

from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.wrapping import LayerStructure, Structure, coverage_rows, integer_mac_share
from mmdet_ptq.wrapping.coverage import bit_operations, float_size_bytes, operations_outside
from mmdet_ptq.wrapping.inputs import attach_inputs
from mmdet_ptq.wrapping.state import ChannelDivision, QuantizationState
from mmdet_ptq.wrapping.structure import ActivationStructure
from mmdet_ptq.wrapping.weights import attach_weight


def affine(bits, **options):
    return dict(type='mmdet_ptq.AffineQuantizer', bits=bits, **options)


@pytest.fixture
def structure():
    """A layer called with three formats, a float one, a product, and an operation that stays float."""
    factors = ['head/attention:matmul/left', 'head/attention:matmul/right']
    activations = dict(
        x=ActivationStructure(affine(8), 1),
        y=ActivationStructure(affine(4, num_channels=6), 1, divided=dict(channels=6, axis=1)),
    )
    activations |= {name: ActivationStructure(affine(bits), 1) for name, bits in zip(factors, (8, 16), strict=True)}
    log = dict(type='mmdet_ptq.LogAffineQuantizer', bits=3, mode='log1p')
    return Structure(
        layers=[
            LayerStructure('neck.conv', 'convolution', 'neck', 600, 9, log, ['x', 'y', None], reason='its third call'),
            LayerStructure('neck.last', 'linear', 'neck', 100, 9),
            LayerStructure('neck.all', 'linear', 'neck', 250, 9, affine(8), ['x', 'x']),
        ],
        activations=activations,
        products=[dict(module='head.attention', call=0, function='matmul', index=0, factors=factors, macs=30)],
        uncovered=[dict(module='head.bare', operation='conv2d', macs=20, reason='no layer')],
    )


def test_a_row_tells_every_format_that_a_layer_meets(structure):
    conv, last, whole = coverage_rows(structure)[:3]
    assert conv.activation == '4-bit affine per channel (scales migrated), 8-bit affine, float'
    assert (conv.weight, conv.integer, conv.reason) == ('3-bit log-affine', False, 'its third call')
    assert (last.weight, last.activation, last.integer) == ('float', 'float', False)
    assert (whole.weight, whole.activation, whole.integer) == ('8-bit affine', '8-bit affine', True)


def test_products_and_what_no_layer_computes_follow_the_layers(structure):
    product, bare = coverage_rows(structure)[3:]
    assert (product.name, product.kind, product.part) == ('head.attention:matmul', 'product of activations', 'head')
    # the right factor stands where layers have their weight
    assert (product.weight, product.activation, product.integer) == ('16-bit affine', '8-bit affine', True)
    assert (bare.name, bare.kind, bare.part, bare.reason) == ('head.bare', 'conv2d', 'head', 'no layer')
    assert (bare.macs, bare.integer) == (20, False)


def test_the_integer_share_counts_products_and_is_zero_of_nothing(structure):
    assert integer_mac_share(structure) == (250 + 30) / (600 + 100 + 250 + 30 + 20)
    assert integer_mac_share(Structure()) == 0


def test_bit_operations_outside_of_layers_by_hand(structure):
    assert operations_outside(structure) == 30 * 8 * 16 + 20 * 32 * 32
    structure.products.clear()
    assert operations_outside(structure) == 20 * 32 * 32


@pytest.mark.parametrize(
    ('weight', 'inputs', 'expected'),
    [
        (affine(4), [affine(8)], 4 * 8),
        (affine(4), [affine(2), affine(16), affine(8)], 4 * 16),
        (affine(4), [affine(2), None], 4 * 32),
        (None, [affine(8)], 32 * 8),
        (affine(4), [], 4 * 32),
    ],
)
def test_the_widest_input_of_a_layer_counts(weight, inputs, expected):
    assert bit_operations(10, weight, inputs) == 10 * expected


def test_what_quantization_adds_does_not_count_as_the_float_detector():
    net = nn.ModuleDict(dict(linear=nn.Linear(4, 6), norm=nn.BatchNorm2d(6)))
    attach_weight(net['linear'], AffineQuantizer(bits=4, num_channels=6, channel_axis=0))
    state = QuantizationState(
        {'linear': AffineQuantizer()}, {'linear': 1}, divisions={'linear': ChannelDivision(4, -1)}
    )
    attach_inputs(net, state, {'linear': ['linear']})
    assert float_size_bytes(net) == 4 * (4 * 6 + 6 + 4 * 6)
    assert float_size_bytes(net.to(torch.float16)) == float_size_bytes(net)  # in float32, whatever it is kept in
