"""ncnn's two files: text that is read back as it was written, and weights that lie where ncnn looks for them."""

import json

import numpy as np
import pytest

from mmdet_ptq.deploy.ncnn.format import (
    INT8_TAG,
    NcnnLayer,
    array,
    floats,
    int8_weight,
    param_meta,
    param_text,
    parse_param,
    split_weights,
    write_network,
)
from mmdet_ptq.errors import PTQError


@pytest.fixture
def layers():
    return [
        NcnnLayer('Input', 'in0', [], ['in0']),
        NcnnLayer('Split', 'split', ['in0'], ['a', 'b']),
        NcnnLayer('Bias', 'left', ['a'], ['c'], {0: '3'}, floats([1, 2, 3])),
        NcnnLayer('InnerProduct', 'right', ['b'], ['d'], {0: '2', 1: '1', 2: '6'}, bytes(4) + floats(range(8))),
        NcnnLayer('Concat', 'join', ['c', 'd'], ['out0'], {0: '0', -23301: array(0.5, -2)}),
    ]


def test_a_text_is_read_back_as_it_was_written(layers):
    text = param_text(layers, dict(layers={'neck.conv': 'left'}))
    lines = text.splitlines()
    # five layers, six blobs
    assert lines[:2] == ['7767517', '5 6'] and lines[-1] == '# {"layers": {"neck.conv": "left"}}'
    assert lines[3].split() == ['Split', 'split', '1', '2', 'in0', 'a', 'b']
    assert lines[6].split() == 'Concat join 2 1 c d out0 0=0 -23301=2,5.000000000e-01,-2.000000000e+00'.split()
    found = parse_param(text)
    assert [layer.line() for layer in found] == [layer.line() for layer in layers]
    assert found[4].params == layers[4].params and found[4].bottoms == ['c', 'd'] and found[2].weights == b''
    assert param_meta(text) == dict(layers={'neck.conv': 'left'})


@pytest.mark.parametrize(
    'change',
    [
        lambda text: '',
        lambda text: text.replace('7767517', '7767518'),
        lambda text: text.replace('5 6', '6 6'),
        lambda text: '\n'.join(text.splitlines()[:-2]),
        lambda text: text.replace('1 2 in0', '1 x in0'),
        lambda text: text.replace('1 2 in0', '-1 2 in0'),
        lambda text: text.replace('2 1 c d', '2 9 c d'),
        lambda text: text.replace(' 0=3', ' 0'),
        lambda text: text.replace(' 0=3', ' x=3'),
    ],
)
def test_what_is_no_param_or_a_part_of_one_is_refused(layers, change):
    text = param_text(layers, {})
    assert parse_param(text)
    assert change(text) != text
    with pytest.raises(PTQError, match=r'the text is no ncnn \.param file, or only a part of one'):
        parse_param(change(text))


@pytest.mark.parametrize('text', ['', 'Concat join 0 0', '7767517\n# {"a": ', '# ' + '[' * 10**5])
def test_a_file_that_says_nothing_readable_about_itself_says_nothing(text):
    assert param_meta(text) is None


def test_weights_are_tagged_and_padded_as_ncnn_reads_them():
    values = np.array([[-128, 127, 1], [2, 3, 4]], float)
    data = int8_weight(values)
    assert data[:4] == INT8_TAG and len(data) == 4 + 8
    np.testing.assert_array_equal(np.frombuffer(data[4:10], np.int8), values.ravel())
    assert data[10:] == bytes(2) and len(int8_weight(np.zeros(8))) == 4 + 8
    assert np.frombuffer(floats(np.arange(6.0).reshape(2, 3).T), np.float32).tolist() == [0, 3, 1, 4, 2, 5]
    # enough digits for a float32 to come back
    numbers = np.random.default_rng(0).normal(size=50).astype(np.float32)
    count, *texts = array(*numbers).split(',')
    assert int(count) == 50 and np.array_equal(np.array(texts, np.float32), numbers)


def test_a_network_is_two_files_that_belong_together(layers, tmp_path):
    path = write_network(layers, tmp_path, dict(format='f'))
    assert path == tmp_path / 'model.param' and {file.name for file in tmp_path.iterdir()} == {
        'model.param',
        'model.bin',
    }
    assert (tmp_path / 'model.bin').read_bytes() == layers[2].weights + layers[3].weights
    meta = param_meta(path.read_text())
    assert meta['weights'] == 12 + 36 and meta['format'] == 'f' and len(parse_param(path.read_text())) == 5
    before = json.loads(json.dumps(meta))
    layers[2].weights = floats([1, 2, 4])
    changed = param_meta(write_network(layers, tmp_path, dict(format='f')).read_text())
    assert changed.pop('checksum') != before.pop('checksum') and changed == before


def test_each_layer_gets_what_ncnn_reads_for_it(layers):
    pytest.importorskip('ncnn', reason="needs pip install 'mmdet-ptq[ncnn]'")
    data = b''.join(layer.weights for layer in layers)
    found = parse_param(param_text(layers, {}))
    split_weights(found, data)
    assert [layer.weights for layer in found] == [layer.weights for layer in layers]
    with pytest.raises(PTQError, match='the layers that pnnx wrote read 48 of 52 bytes of weights'):
        split_weights(found, data + bytes(4))
