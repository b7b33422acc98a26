"""What a model says about itself: checked before it is believed, and told in one sentence where it is wrong."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from mmdet_ptq.deploy.network.meta import (
    MOST_REGIONS,
    called,
    check_meta,
    checked_meta,
    input_meta,
    read_meta,
    write_meta,
)
from mmdet_ptq.deploy.network.seal import BLANK, seal
from mmdet_ptq.errors import PTQError
from mmdet_ptq.fields import Malformed

META = dict(
    format='mmdet_ptq.onnx',
    version='0.2.0',
    runtime='onnxruntime',
    input_shape=[1, 3, 32, 64],
    dynamic_batch=False,
    outputs=dict(cls=[0, [2]], box=[1, None]),
    raw_shapes=[[1, 4], [1, 2], []],
    layers={'neck.conv': 'neck.conv', 'neck.conv#1': 'neck.conv'},
)


def changed(**fields):
    return {**copy.deepcopy(META), **fields}


@pytest.mark.parametrize(
    'meta',
    [
        META,
        changed(layers={}),
        changed(outputs=0, raw_shapes=[[1]]),
        changed(end2end=True, raw_shapes=[[1]]),  # those of the network before what is added to it
        changed(regions=MOST_REGIONS, input=dict(channels='RGB', pad_value=0, mean=[1, 2.5], classes=['a'])),
        {key: value for key, value in META.items() if key != 'raw_shapes'},
    ],
)
def test_what_exports_say_is_accepted(meta):
    check_meta(meta)
    check_meta(json.loads(write_meta(meta)))


@pytest.mark.parametrize(
    ('meta', 'told'),
    [
        ([], 'its meta must be a dict, got a list'),
        (changed(color='red'), 'its meta has the unknown field `color`'),
        ({key: value for key, value in META.items() if key != 'runtime'}, 'its meta lacks the field `runtime`'),
        (changed(input_shape=[1, 3, 32]), r'its input_shape is \[1, 3, 32\], which is no size of an image'),
        (changed(input_shape=[2**20, 3, 2**10, 2**10]), 'which is no size of an image'),
        (changed(input_shape=[1, 3, 0, 64]), r'its meta.input_shape\[2\] must be a whole number from 1'),
        (changed(outputs=[0, 0, 1]), 'its outputs do not name each tensor once'),
        (changed(outputs=[1, 2, 3]), 'its outputs do not name each tensor once'),
        (changed(outputs=[]), 'its outputs do not name each tensor once'),
        (changed(outputs=[0, True, 1]), 'its meta.outputs must be lists of places'),
        (changed(outputs=dict(cls='0')), 'its meta.outputs must be lists of places'),
        (changed(raw_shapes=[[1]]), 'it tells 1 shapes of 3 outputs'),
        (changed(regions=MOST_REGIONS + 1), 'its meta.regions must be a whole number from 1 to 2048'),
        (changed(layers=[3]), r'its meta.layers\[0\] must be a list, got 3'),
    ],
)
def test_what_no_export_says_is_refused(meta, told):
    with pytest.raises(Malformed, match=told):
        check_meta(meta)


def test_a_sealed_text_is_read_and_any_other_is_told_in_a_sentence(tmp_path):
    path, beside = tmp_path / 'model.xml', tmp_path / 'model.bin'
    beside.write_bytes(b'weights')
    content = seal(write_meta(META).encode(), b'weights')
    path.write_bytes(content)
    assert BLANK not in content.decode() and checked_meta(content.decode(), path, beside) == META
    # one that tells no checksum is of an older version
    assert checked_meta(json.dumps(META), path) == META
    for text, told in (
        ('{"format"', 'what it says about itself cannot be read'),
        ('[' * 10**5, 'what it says about itself cannot be read'),
        ('[]', 'its meta must be a dict, got a list'),
    ):
        with pytest.raises(PTQError, match=f"model.xml' is damaged: {told}; export it again with tools/export.py"):
            checked_meta(text, path)
    beside.write_bytes(b'Weights')
    with pytest.raises(PTQError, match="model.xml' and .*model.bin' changed since the export"):
        checked_meta(content.decode(), path, beside)


def test_calls_are_those_of_layers_and_products():
    assert called(META) == ['neck.conv', 'neck.conv#1']
    meta = read_meta(write_meta(changed(products=['head:matmul'])))
    assert called(meta) == ['neck.conv', 'neck.conv#1', 'head:matmul']


@pytest.mark.parametrize('swaps', [True, False])
def test_a_program_is_told_how_pixels_become_inputs(swaps):
    preprocessor = SimpleNamespace(
        _channel_conversion=swaps,
        pad_value=114,
        _enable_normalize=True,
        mean=torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
        std=torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1),
    )
    detector = SimpleNamespace(data_preprocessor=preprocessor, dataset_meta=dict(classes=('cat', 'dog')))
    told = input_meta(detector, 3)
    expected = dict(pad_value=114, mean=[1, 2, 3], std=[4, 5, 6], classes=['cat', 'dog'])
    assert told == dict(channels='RGB' if swaps else 'BGR', **expected)
    check_meta(changed(input=told))
    preprocessor._enable_normalize, detector.dataset_meta = False, None
    assert input_meta(detector, 5) == dict(pad_value=114)
    assert input_meta(SimpleNamespace(), 3) == {}
