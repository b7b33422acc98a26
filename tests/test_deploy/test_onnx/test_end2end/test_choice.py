"""Which detectors have an end-to-end graph, and what it is called from."""

from __future__ import annotations

import inspect

import architectures
import pytest

from mmdet_ptq.deploy.network.raw_outputs import first_outputs
from mmdet_ptq.deploy.onnx.end2end.choice import INPUTS, check_end2end, end2end_trouble, end_to_end
from mmdet_ptq.deploy.onnx.end2end.one_stage import OneStage
from mmdet_ptq.deploy.onnx.end2end.two_stage import TwoStages
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import KINDS, tiny_detector

SHAPE = (1, 3, 64, 64)
BOXES = ['boxes', 'scores', 'labels']


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    architectures.register(monkeypatch)


@pytest.mark.parametrize(
    'kind, graph, names, regions',
    [
        *((kind, OneStage, BOXES, 0) for kind in KINDS if kind != 'faster_rcnn'),
        ('faster_rcnn', TwoStages, BOXES, 50),
        ('cascade_rcnn', TwoStages, BOXES, 50),
        ('mask_rcnn', TwoStages, [*BOXES, 'masks'], 50),
    ],
)
def test_detectors_of_one_and_two_stages_have_a_graph(kind, graph, names, regions):
    detector = tiny_detector(kind)
    check_end2end(detector)
    assert end2end_trouble(detector) == ''
    if regions:
        detector.rpn_head.test_cfg.max_per_img = regions
    network = end_to_end(detector, first_outputs(detector, SHAPE))
    assert type(network) is graph and list(network.names) == names and network.regions == regions
    # what it reads is called as its inputs are in the file
    assert list(inspect.signature(network.forward).parameters) == INPUTS
    # the detector itself is in it, not a copy
    assert {id(p) for p in network.parameters()} == {id(p) for p in detector.parameters()}


@pytest.mark.parametrize(
    'kind, sentence',
    [
        ('deformable_detr', 'DeformableDETR predicts in a way of its own'),
        ('mask2former', 'Mask2Former predicts in a way of its own'),
        ('yolact', 'YOLACT predicts in a way of its own'),
        ('solo', 'SOLO predicts in a way of its own'),
        ('query_inst', 'QueryInst predicts in a way of its own'),
        ('point_rend', r'MaskPointHead|PointRend'),
        ('groie', r'GenericRoIExtractor reads regions in a way of its own'),
    ],
)
def test_others_are_refused_in_one_sentence_before_anything_is_made(kind, sentence):
    detector = tiny_detector(kind)
    for refuse in (check_end2end, lambda detector: end_to_end(detector, None)):
        with pytest.raises(PTQError, match=rf'^--end2end: .*({sentence}).*; export without --end2end\.$') as error:
            refuse(detector)
        assert f'--end2end: {end2end_trouble(detector)}; export' in str(error.value) and '\n' not in str(error.value)


def test_of_two_stages_the_trouble_of_each_is_told():
    detector = tiny_detector('faster_rcnn')
    detector.roi_head.test_cfg.nms = dict(type='soft_nms', iou_threshold=0.5)
    assert 'StandardRoIHead has `model.test_cfg.rcnn.nms=' in end2end_trouble(detector)
    detector.rpn_head.test_cfg.nms = dict(type='nms')
    assert 'RPNHead has `model.test_cfg.rpn.nms=' in end2end_trouble(detector)
    detector.__class__ = type('Own', (type(detector),), dict(predict=lambda self, *args: None))
    assert end2end_trouble(detector) == 'Own predicts in a way of its own'


def test_more_regions_than_one_graph_holds_are_refused():
    detector = tiny_detector('faster_rcnn')
    detector.rpn_head.test_cfg.max_per_img = 2048
    check_end2end(detector)
    detector.rpn_head.test_cfg.max_per_img = 2049
    with pytest.raises(PTQError, match='`model.test_cfg.rpn.max_per_img` is 2049, and one graph holds 2048'):
        check_end2end(detector)
