"""Which number formats ncnn's int8 layers have."""

from __future__ import annotations

import pytest

from mmdet_ptq.deploy.ncnn.formats import check_activation, check_ncnn
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer
from mmdet_ptq.wrapping import LayerStructure, Structure
from mmdet_ptq.wrapping.structure import ActivationStructure

WEIGHT = AffineQuantizer(8, symmetric=True, num_channels=4, channel_axis=0).spec()


def spec(bits=8, **more):
    return AffineQuantizer(bits, **more).spec()


def structure(activation, weight=WEIGHT, **more):
    """One convolution that reads one tensor, and a tensor between the layers that no layer reads."""
    return Structure(
        layers=[LayerStructure('conv', 'convolution', 'backbone', 1, 1, weight, ['conv'])],
        activations={'conv': ActivationStructure(activation, 1, **more), 'between': ActivationStructure(spec(), 0)},
    )


@pytest.mark.parametrize(
    'fits',
    [
        spec(narrow_range=True),
        spec(symmetric=True, narrow_range=True),
        spec(7),
        spec(2, symmetric=True),
        spec(16),
        spec(16, symmetric=True),
        spec(narrow_range=True, num_channels=3, shared_zero_point=True),
        spec(narrow_range=True, num_channels=3, symmetric=True),
        # of fewer bits no code is shifted
        spec(7, num_channels=3),
    ],
    ids=lambda fits: f'{fits["bits"]}-{fits["symmetric"]}-{fits["num_channels"]}-{fits["shared_zero_point"]}',
)
def test_formats_with_at_most_255_codes_fit(fits):
    check_activation('conv', fits)
    check_ncnn(structure(fits))


@pytest.mark.parametrize(
    'activation, sentence',
    [
        (spec(), 'quantized with all 256 codes.*narrow_range=True.*or 7 bits'),
        (spec(symmetric=True), 'quantized with all 256 codes'),
        (
            spec(narrow_range=True, num_channels=3),
            'quantized with a zero point for each channel.*shared_zero_point=True',
        ),
        (
            LogAffineQuantizer(4).spec(),
            r"of type mmdet_ptq\.LogAffineQuantizer.*activations\.quantizer\.type='mmdet_ptq\.AffineQuantizer'",
        ),
    ],
    ids=['all codes', 'all signed codes', 'zero points', 'no uniform one'],
)
def test_other_formats_of_what_layers_read_are_named(activation, sentence):
    for refuse in (lambda: check_activation('conv', activation), lambda: check_ncnn(structure(activation))):
        with pytest.raises(PTQError, match=f'^the activation conv is {sentence}') as error:
            refuse()
        assert '\n' not in str(error.value)


def test_what_no_layer_reads_may_have_any_format():
    """It is left out of ncnn's files: 'between' has all 256 codes, and so has what a float layer reads."""
    check_ncnn(structure(spec(narrow_range=True)))
    unread = structure(spec())
    unread.layers[0].inputs = [None]
    check_ncnn(unread)


def test_divided_channels_are_refused_wherever_they_are():
    divided = structure(spec(narrow_range=True), divided=dict(channels=3, axis=1))
    with pytest.raises(PTQError, match=r'channels of the activation conv are divided.*scale_migration=0'):
        check_ncnn(divided)
    divided.layers.clear()
    with pytest.raises(PTQError, match='scale_migration=0'):
        check_ncnn(divided)


@pytest.mark.parametrize('weight', [None, spec(4, num_channels=4, channel_axis=0), LogAffineQuantizer(4, 4).spec()])
def test_weights_of_fewer_bits_may_have_a_zero_point(weight):
    """Their levels fit int8; float weights have none."""
    check_ncnn(structure(spec(narrow_range=True), weight))


def test_the_layer_whose_weight_has_a_zero_point_is_named():
    weight = spec(num_channels=4, channel_axis=0)
    with pytest.raises(PTQError, match=r'the weight of conv is quantized with a zero point.*weights\.quantizer'):
        check_ncnn(structure(spec(narrow_range=True), weight))
