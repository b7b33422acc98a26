"""OpenVINO's models without what nobody reads compute the same."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

openvino = pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")

from openvino import opset13 as ops  # noqa: E402

from mmdet_ptq.deploy.openvino.compact import compact, share_constants, strip_layout  # noqa: E402
from mmdet_ptq.deploy.openvino.model import FLOAT32, layer_operations, shared_core  # noqa: E402

SHAPE = [1, 2, 3, 4]
IMAGE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def computed(model):
    found = shared_core().compile_model(model, 'CPU', FLOAT32)([IMAGE])
    return [found[place] for place in range(len(model.outputs))]


def constants(model):
    return [op for op in model.get_ordered_ops() if op.get_type_name() == 'Constant']


def chain(*arrays):
    """An image to which arrays are added, one after another."""
    given = x = ops.parameter(SHAPE, np.float32, 'image')
    for array in arrays:
        value = ops.constant(array)
        x = ops.add(x, value if array.dtype == np.float32 else ops.convert(value, 'f32'))
    return openvino.Model([x], [given])


ONES = np.ones((1, 2, 1, 1), np.float32)


@pytest.mark.parametrize(
    'arrays, removed',
    [
        ([ONES, ONES, ONES], 2),
        ([ONES, 2 * ONES], 0),
        ([ONES, ONES[0]], 0),
        # the same bytes of another type
        ([np.zeros((1, 2, 1, 1), np.float32), np.zeros((1, 2, 1, 1), np.int32)], 0),
        ([ONES.astype(np.int32), ONES.astype(np.int32)], 1),
        # weights that share codes would become float
        ([ONES.astype(np.int8), ONES.astype(np.int8)], 0),
    ],
    ids=['equal', 'values', 'shapes', 'types', 'integers', 'codes'],
)
def test_equal_constants_are_stored_once(arrays, removed):
    model = chain(*arrays)
    before, stored = computed(model), len(constants(model))
    assert share_constants(model) == removed
    assert len(constants(model)) == stored - removed
    np.testing.assert_array_equal(computed(model)[0], before[0])
    np.testing.assert_allclose(before[0], IMAGE + sum(array.astype(np.float32) for array in arrays), rtol=1e-6)
    assert share_constants(model) == 0


def transposed(groups):
    """Two transposed convolutions of which one has a bias, as the conversion names them, and another addition."""
    given = ops.parameter(SHAPE, np.float32, 'image')
    weight = np.random.default_rng(1).standard_normal((2, 2, 2, 2)).astype(np.float32)
    make = ops.convolution_backprop_data
    if groups > 1:
        weight, make = weight.reshape(2, 1, 2, 2, 2), ops.group_convolution_backprop_data
    up = make(given, ops.constant(weight), strides=[2, 2], pads_begin=[0, 0], pads_end=[0, 0], dilations=[1, 1])
    up.set_friendly_name('convolution')
    channels = up.output(0).get_partial_shape()[1].get_length()
    out = ops.add(up, ops.constant(np.ones((1, channels, 1, 1), np.float32)))
    out.set_friendly_name('neck.up')
    last = ops.add(out, ops.constant(np.float32(2)))
    last.set_friendly_name('head.add')
    return openvino.Model([last], [given])


@pytest.mark.parametrize('groups', [1, 2])
def test_transposed_convolutions_are_called_as_their_layers(groups):
    model = transposed(groups)
    before = computed(model)
    calls = ['neck.up', 'head.add']
    assert not layer_operations(model, calls)
    compact(model, calls)
    found = layer_operations(model, calls)
    assert {name: op.get_friendly_name() for name, op in found.items()} == {'neck.up': 'neck.up/WithoutBiases'}
    assert found['neck.up'].get_type_name().endswith('ConvolutionBackpropData')
    np.testing.assert_array_equal(computed(model)[0], before[0])


def test_what_the_conversion_leaves_behind_goes_and_the_rest_stays():
    model = chain(ONES)
    for name in ('framework', 'conversion_parameters', 'mmdet_ptq'):
        model.set_rt_info('told', [name])
    compact(model, [])
    assert set(model.rt_info) == {'mmdet_ptq'}
    compact(model, [])


def test_texts_lose_their_layout_alone(tmp_path):
    path = tmp_path / 'model.xml'
    path.write_text(
        '<?xml version="1.0"?>\n<net name="a">\n\t<layers>\n\n\n\t\t<layer id="0"> a  b </layer>\n\t\t<port />\n'
        '\t</layers>\n\t<rt_info>\n\t\t<MO value="{&quot;ü&quot;: [1,  2]}" />tail\n\t</rt_info>\n</net>\n',
        encoding='utf-8',
    )
    before = path.read_bytes()
    elements = [(element.tag, element.attrib) for element in ElementTree.parse(path).iter()]
    strip_layout(path)
    text = path.read_text(encoding='utf-8')
    assert [(element.tag, element.attrib) for element in ElementTree.parse(path).iter()] == elements
    assert len(path.read_bytes()) < len(before) and '\t' not in text.replace('tail\n\t', '')
    assert '<layer id="0"> a  b </layer>' in text and 'tail' in text
    again = path.read_bytes()
    strip_layout(path)
    assert path.read_bytes() == again


def test_stripped_models_are_read_as_before(tmp_path):
    model, path = transposed(1), tmp_path / 'model.xml'
    openvino.save_model(model, path, compress_to_fp16=False)
    size = path.stat().st_size
    strip_layout(path)
    assert path.stat().st_size < size
    np.testing.assert_array_equal(computed(shared_core().read_model(path))[0], computed(model)[0])
