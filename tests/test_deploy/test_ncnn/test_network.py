"""Opening ncnn's files, and what a network gives of an image."""

from __future__ import annotations

import numpy as np
import pytest

from mmdet_ptq.errors import PTQError

pytest.importorskip('ncnn', reason="needs ncnn: pip install 'mmdet-ptq[ncnn]'")

from mmdet_ptq.deploy.ncnn import network as module
from mmdet_ptq.deploy.ncnn.format import NcnnLayer, floats, param_text, write_network
from mmdet_ptq.deploy.ncnn.network import NcnnNetwork

FACTORS = [2.0, -1.0, 0.5]
META = dict(
    format='mmdet_ptq.ncnn',
    version='0',
    runtime='ncnn',
    input_shape=[1, 3, 4, 5],
    dynamic_batch=False,
    outputs=[0, 1],
    layers={},
)


def layers():
    """An image times a factor per channel, and a sum of the two, which comes first in the file."""
    scale = NcnnLayer('Scale', 'scale', ['left'], ['scaled'], {0: '3', 1: '0'}, floats(FACTORS))
    return [
        NcnnLayer('Input', 'in0', [], ['in0']),
        NcnnLayer('Split', 'split', ['in0'], ['left', 'right']),
        scale,
        NcnnLayer('Split', 'split_1', ['scaled'], ['out1', 'again']),
        NcnnLayer('BinaryOp', 'sum', ['again', 'right'], ['out0'], {0: '0'}),
    ]


@pytest.fixture
def path(tmp_path):
    return write_network(layers(), tmp_path, META)


IMAGE = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
SCALED = IMAGE * np.float32(FACTORS).reshape(3, 1, 1)


@pytest.mark.parametrize('packing', [True, False])
def test_outputs_come_by_their_number(path, packing):
    network = NcnnNetwork(path, threads=2, packing=packing)
    before = IMAGE.copy()
    for _ in range(2):
        total, scaled = network.run(IMAGE)
        np.testing.assert_allclose(scaled, SCALED, rtol=1e-6)
        np.testing.assert_allclose(total, SCALED + IMAGE, rtol=1e-6)
    np.testing.assert_array_equal(IMAGE, before)


def test_any_blob_of_a_run_that_keeps_them_can_be_read(path):
    network = NcnnNetwork(path, keep=True, packing=False)
    right, scaled = network.run(IMAGE, ['right', 'scaled'])
    np.testing.assert_array_equal(right, IMAGE)
    np.testing.assert_allclose(scaled, SCALED, rtol=1e-6)


def test_a_blob_that_is_not_there_is_no_result(path):
    with pytest.raises(PTQError, match=r'ncnn fails on an image of shape \(3, 4, 5\) \(status -1\)'):
        NcnnNetwork(path).run(IMAGE, ['nowhere'])


def test_the_file_tells_its_layers_and_what_it_says_of_itself(path):
    network = NcnnNetwork(path)
    assert [(layer.type, layer.bottoms, layer.tops) for layer in network.layers] == [
        (layer.type, layer.bottoms, layer.tops) for layer in layers()
    ]
    # the checksum is no business of those that read the rest
    assert network.meta == {**META, 'weights': 12}


def test_files_without_a_checksum_are_of_an_older_version(path):
    path.write_text(param_text(layers(), {**META, 'weights': 12}))
    assert len(NcnnNetwork(path).run(IMAGE)) == 2


def test_a_changed_weight_is_noticed(path):
    path.with_suffix('.bin').write_bytes(floats([2.0, 1.0, 0.5]))
    with pytest.raises(PTQError, match=r'model\.param.* and .*model\.bin.* changed since the export'):
        NcnnNetwork(path)


@pytest.mark.parametrize(
    'change, sentence',
    [
        (dict(outputs=[0, 0]), r'is damaged: its outputs do not name each tensor once; export it again with'),
        (dict(input_shape=[3, 4, 5]), r'is damaged: its input_shape is \[3, 4, 5\]'),
        (dict(weights=16), r'model\.bin. has 12 bytes instead of 16: it is truncated or belongs to another \.param'),
        (dict(weights='12'), 'was not exported by mmdet-ptq, or is only a part'),
    ],
    ids=['outputs', 'shape', 'length', 'no length'],
)
def test_what_the_file_says_is_checked(path, change, sentence):
    path.write_text(param_text(layers(), {**META, 'weights': 12, **change}))
    with pytest.raises(PTQError, match=sentence) as error:
        NcnnNetwork(path)
    assert '\n' not in str(error.value)


def test_texts_that_are_too_long_are_not_read(path, monkeypatch):
    monkeypatch.setattr(module, 'MOST_TEXT', path.stat().st_size - 1)
    with pytest.raises(PTQError, match='MiB, which no network is; export it again'):
        NcnnNetwork(path)
    monkeypatch.setattr(module, 'MOST_TEXT', path.stat().st_size)
    NcnnNetwork(path)


def test_what_ncnn_cannot_load_is_told(tmp_path):
    unknown = [layers()[0], NcnnLayer('NoSuchLayer', 'layer', ['in0'], ['out0'])]
    with pytest.raises(PTQError, match=r'ncnn cannot load .*model\.param.*another version of ncnn, export it again'):
        NcnnNetwork(write_network(unknown, tmp_path, META))
    # a Scale of 4 channels reads more than there is
    short = [layers()[0], NcnnLayer('Scale', 'scale', ['in0'], ['out0'], {0: '4', 1: '0'}, floats(FACTORS))]
    with pytest.raises(PTQError, match=r'ncnn cannot load .*model\.bin.*; export it again'):
        NcnnNetwork(write_network(short, tmp_path, META))


def test_a_folder_or_a_text_of_no_ascii_is_no_network(tmp_path, path):
    path.write_bytes('7767517\n1 1\nInput ä 0 1 in0\n'.encode())
    with pytest.raises(PTQError, match=r'is no ncnn \.param file, or only a part of one'):
        NcnnNetwork(path)
    (tmp_path / 'other.param').mkdir()
    with pytest.raises(PTQError, match=r"there is no file '.*other\.param'; an ncnn network is a \.param and a \.bin"):
        NcnnNetwork(tmp_path / 'other.param')
