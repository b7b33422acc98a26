"""Suppression of constant shape keeps what mmcv's does, and says of which settings it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms
from mmengine.config import ConfigDict
from torch import nn

from mmdet_ptq.deploy.onnx.end2end.suppression import MAX_DETECTIONS, Candidates, Suppression, nms_trouble
from mmdet_ptq.deploy.onnx.nodes import OPSET

pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
onnxruntime = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")

PLAIN = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=12)
CONFIGS = {
    'by class': PLAIN,
    'agnostic': dict(PLAIN, nms=dict(iou_threshold=0.3, class_agnostic=True)),
    # more places than candidates
    'no limit': dict(nms=dict(type='nms', iou_threshold=0.7)),
}
IMAGES, CANDIDATES = 3, 40


class Suppressing(nn.Module):
    def __init__(self, test_cfg):
        super().__init__()
        self.suppression = Suppression(test_cfg)

    def forward(self, boxes, scores, labels):
        return self.suppression(Candidates(boxes, scores, labels))


def candidates(seed):
    """Boxes that overlap, one in four rejected; the last image has none."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(IMAGES, CANDIDATES, 2, generator=generator) * 30 - 5
    boxes = torch.cat([corner, corner + 5 + torch.rand(IMAGES, CANDIDATES, 2, generator=generator) * 25], -1)
    scores = torch.rand(IMAGES, CANDIDATES, generator=generator)
    scores = torch.where(torch.rand(IMAGES, CANDIDATES, generator=generator) < 0.25, 0.0, scores)
    scores[-1] = 0
    return boxes, scores, torch.randint(0, 3, (IMAGES, CANDIDATES), generator=generator)


@pytest.fixture(scope='module', params=CONFIGS)
def suppressing(request):
    cfg = CONFIGS[request.param]
    given = dict(zip(('boxes', 'scores', 'labels'), candidates(0), strict=True))
    program = torch.onnx.export(
        Suppressing(cfg).eval(),
        tuple(given.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(given),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=['CPUExecutionProvider'])
    return cfg, session


def test_what_is_kept_is_mmcvs_best_first(suppressing):
    cfg, session = suppressing
    count = cfg.get('max_per_img', MAX_DETECTIONS)
    kept = set()
    for seed in range(5):
        given = candidates(seed)
        names = [value.name for value in session.get_inputs()]
        found = session.run(None, dict(zip(names, (value.numpy() for value in given), strict=True)))
        assert [part.shape for part in found] == [(IMAGES, count, 4), (IMAGES, count), (IMAGES, count)]
        assert found[2].dtype == np.int64
        for place, (boxes, scores, labels) in enumerate(zip(*given, strict=True)):
            real, settings = scores > 0, dict(cfg['nms'])
            boxes, scores, labels = boxes[real], scores[real], labels[real]
            if real.any():  # mmdet does not ask otherwise
                dets, index = batched_nms(boxes, scores, labels, settings, settings.pop('class_agnostic', False))
                boxes, scores, labels = dets[:count, :4], dets[:count, 4], labels[index[:count]]
            number = len(boxes)
            np.testing.assert_allclose(found[0][place, :number], boxes, rtol=1e-6)
            np.testing.assert_allclose(found[1][place, :number], scores, rtol=1e-6)
            np.testing.assert_array_equal(found[2][place, :number], labels)
            # places without a detection
            assert not found[0][place, number:].any() and not found[1][place, number:].any()
            assert (found[2][place, number:] == -1).all()
            kept.add(number)
    assert min(kept) == 0 and 5 < max(kept) < CANDIDATES


def test_settings_decide_over_how_many_places_there_are():
    assert Suppression(ConfigDict(PLAIN)).count == 12 and not Suppression(ConfigDict(PLAIN)).agnostic
    assert Suppression(CONFIGS['agnostic']).agnostic
    assert [limit.item() for limit in Suppression(PLAIN).limits] == [12, 0.5]


NMS = dict(type='nms', iou_threshold=0.5)


@pytest.mark.parametrize(
    'cfg',
    [
        dict(score_thr=0.1, nms=NMS),
        dict(score_thr=0.1, nms=dict(iou_threshold=1), max_per_img=1),
        ConfigDict(score_thr=0.1, nms=dict(NMS, class_agnostic=True, split_thr=100), nms_pre=7),
    ],
)
def test_plain_settings_are_no_trouble(cfg):
    assert nms_trouble('Head', 'test_cfg', cfg, ('score_thr',)) == ''


@pytest.mark.parametrize(
    'cfg, told',
    [
        (None, '`test_cfg` of Head needs `score_thr` and `nms`, and is None'),
        ({}, '`test_cfg` of Head needs `score_thr` and `nms`, and is {}'),
        (dict(nms=NMS), '`test_cfg` of Head needs `score_thr` and `nms`, and is '),
        (dict(score_thr=0.1, nms={}), 'needs `score_thr` and `nms`'),
        (dict(score_thr=0.1, nms=NMS, max_per_img=0), 'must be a number of detections, and is 0'),
        (dict(score_thr=0.1, nms=NMS, max_per_img=True), 'must be a number of detections, and is True'),
        (dict(score_thr=0.1, nms=NMS, max_per_img=1.5), '`test_cfg.max_per_img` of Head must be'),
        (dict(score_thr=0.1, nms=dict(NMS, type='soft_nms')), "Head has `test_cfg.nms={'type': 'soft_nms', "),
        (dict(score_thr=0.1, nms=dict(type='nms')), "known is dict(type='nms', iou_threshold=...)"),
        (dict(score_thr=0.1, nms=dict(NMS, max_num=3)), "'max_num': 3"),
    ],
)
def test_other_settings_are_told(cfg, told):
    assert told in nms_trouble('Head', 'test_cfg', cfg, ('score_thr',))
