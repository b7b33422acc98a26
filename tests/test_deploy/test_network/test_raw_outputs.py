"""A detector's raw outputs in one flat order, their nesting, and which detectors have such networks."""

from __future__ import annotations

import json

import architectures
import pytest
import torch
from mmdet.models.detectors import SingleStageDetector
from torch import nn

from mmdet_ptq.deploy.network.parts import Part
from mmdet_ptq.deploy.network.raw_outputs import (
    RawOutputs,
    check_exportable,
    first_outputs,
    nest_outputs,
    only_head,
    output_layout,
    output_shapes,
    region_shapes,
)
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_detector


class Nested(nn.Module):
    """Returns what heads return: tensors in lists, tuples and dicts, and nothing where a head has no such output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 2, stride=2)
        self.given = []

    def forward(self, image, samples=None, mode='predict'):
        self.given.append((samples, mode))
        x = self.conv(image)
        return [x, (x[:, :1], None)], {'masks': (x.sum((2, 3)),), 'none': None, 'again': x + 1}


LAYOUT = [[0, [1, None]], {'masks': [2], 'none': None, 'again': 3}]


@pytest.fixture(scope='module')
def retinanet():
    return tiny_detector('retinanet')


def test_outputs_are_flat_in_the_order_in_which_they_are_nested():
    detector, image = Nested(), torch.randn(2, 3, 4, 6)
    found = RawOutputs(detector)(image)
    x = detector.conv(image)
    assert isinstance(found, tuple)
    for ours, theirs in zip(found, (x, x[:, :1], x.sum((2, 3)), x + 1), strict=True):
        assert ours.equal(theirs)
    assert detector.given == [(None, 'tensor')]


def test_the_nesting_survives_a_file():
    outputs = Nested()(torch.randn(1, 3, 4, 6))
    layout = json.loads(json.dumps(output_layout(outputs)))
    assert layout == LAYOUT
    flat = [torch.full((), float(i)) for i in range(4)]
    first, second = nest_outputs(flat, layout)
    assert first[0] is flat[0] and first[1][0] is flat[1] and first[1][1] is None
    assert second == {'masks': (flat[2],), 'none': None, 'again': flat[3]}
    assert [type(part) for part in (first, first[1], second['masks'])] == [tuple] * 3
    assert output_layout(flat[0]) == 0 and nest_outputs(flat, 2) is flat[2]


def test_shapes_are_those_of_one_image():
    outputs = first_outputs(Nested(), (3, 3, 5, 9))
    assert output_shapes(outputs) == [[2, 2, 4], [1, 2, 4], [2], [2, 2, 4]]
    # of an empty image, without a gradient
    (first, _), _ = outputs
    assert not first.requires_grad and len(first) == 3
    assert all(channel.unique().numel() == 1 for channel in first.unbind(1))


def test_a_part_of_its_own_is_run_with_what_it_reads(retinanet):
    features = torch.randn(2, 16, 4, 4)
    found = RawOutputs(retinanet, Part('bbox_head.retina_cls', (features,)))(features)
    assert len(found) == 1 and found[0].equal(retinanet.bbox_head.retina_cls(features))


@pytest.mark.parametrize('size', [(0, 64), (64, 0), (-32, 64)])
def test_sizes_that_are_none_are_refused(size):
    told = rf'^--input-shape must be two positive numbers, got {size[0]}x{size[1]} \(height x width\)\.$'
    with pytest.raises(PTQError, match=told):
        first_outputs(Nested(), (1, 3, *size))


def test_sizes_that_the_detector_does_not_take_are_told_from_channels():
    with pytest.raises(PTQError, match=r'cannot take images of 1x8 \(height x width\): .*choose another --input-shape'):
        first_outputs(Nested(), (1, 3, 1, 8))
    with pytest.raises(PTQError, match=r'of 8x8 .*: .*4 channels.*; give the config of the detector') as error:
        first_outputs(Nested(), (1, 4, 8, 8))
    assert 'choose another' not in str(error.value) and '\n' not in str(error.value)


def test_an_error_that_says_nothing_is_told_by_its_type(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(Nested, 'forward', refuse)
    with pytest.raises(PTQError, match='cannot take images of 8x8 .*: NotImplementedError; choose another'):
        first_outputs(Nested(), (1, 3, 8, 8))


def test_regions_have_shapes_of_their_own(retinanet):
    image = torch.zeros(1, 3, 64, 64)
    assert region_shapes(retinanet, image) == []
    # of each region: 3 classes and the background, and 4 numbers for each class
    assert region_shapes(tiny_detector('faster_rcnn'), image) == [[4], [12]]


def test_the_one_head_of_a_detector(retinanet, monkeypatch):
    architectures.register(monkeypatch)
    assert only_head(retinanet) is retinanet.bbox_head
    masks = tiny_detector('solo')
    assert only_head(masks) is masks.mask_head
    for kind in ('faster_rcnn', 'yolact'):
        assert only_head(tiny_detector(kind)) is None
    assert only_head(Nested()) is None


def test_detectors_with_a_forward_of_their_own_are_refused(retinanet, monkeypatch):
    architectures.register(monkeypatch)
    for kind in ('faster_rcnn', 'yolact', 'solo', 'deformable_detr'):
        check_exportable(tiny_detector(kind))
    check_exportable(retinanet)
    own = type('OwnForward', (SingleStageDetector,), dict(_forward=lambda self, inputs, samples=None: inputs))
    monkeypatch.setattr(retinanet, '__class__', own)
    for detector, name in ((Nested(), 'Nested'), (retinanet, 'OwnForward')):
        with pytest.raises(PTQError, match=f'^{name} cannot be exported: runtimes take .*; remove `ptq.export`'):
            check_exportable(detector)


def test_what_is_no_tensor_among_them_is_named():
    x = torch.zeros(1)
    for value in ('retina', 3, 0.5):
        with pytest.raises(PTQError, match=f'the head returns {value!r} among its raw outputs'):
            output_layout(dict(cls=[x], kind=value))
