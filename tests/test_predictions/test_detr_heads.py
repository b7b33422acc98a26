"""Queries of DETR and its kin as aligned predictions: those that mmdet decodes, filtered like boxes of priors."""

from __future__ import annotations

import architectures
import pytest
import torch
from mmdet.models.dense_heads import DETRHead

from mmdet_ptq.calibration.global_loss import FilteredGlobalLoss
from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.predictions import align_head, predict_aligned
from mmdet_ptq.testing import tiny_detector


@pytest.fixture(params=['deformable_detr', 'two_stage_detr'])
def detector(request, monkeypatch):
    architectures.register(monkeypatch)
    return tiny_detector(request.param)


def data_of(detector):
    data = detector.data_preprocessor(architectures.sized_batch(48, 64, seed=2), False)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(img_shape=(48, 64)))
    return data


@torch.no_grad()
def test_scores_and_boxes_are_those_of_mmdet(detector):
    data = data_of(detector)
    aligned = predict_aligned(detector, data['inputs'], data['data_samples'])
    assert aligned.raw is None and aligned.activation == 'sigmoid' and aligned.level_sizes == (20,)
    found = detector(**data, mode='predict')
    for image, sample in enumerate(found):
        theirs = sample.pred_instances
        scores, places = aligned.cls_logits[image].sigmoid().flatten().topk(len(theirs))
        torch.testing.assert_close(scores, theirs.scores)
        boxes = aligned.boxes[image][places // aligned.cls_logits.shape[-1]]
        scale = boxes.new_tensor(sample.scale_factor).repeat(2)
        clipped = torch.stack([boxes[:, 0::2].clamp(0, 64), boxes[:, 1::2].clamp(0, 48)], -1).flatten(1)
        torch.testing.assert_close(clipped / scale, theirs.bboxes)


def test_the_filtered_loss_trains_them_by_classes_and_boxes(detector):
    data = data_of(detector)
    with torch.no_grad():
        teacher = predict_aligned(detector, data['inputs'], data['data_samples'])
    with torch.no_grad():
        for parameter in detector.bbox_head.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    student = predict_aligned(detector, data['inputs'], data['data_samples'], teacher)
    terms = FilteredGlobalLoss(GlobalLossConfig(score_thr=0.0, iou_thr=0.0))(student, teacher)
    assert terms['kept'] == 20 and set(terms) >= {'loss_cls', 'loss_box'} and 'loss_raw' not in terms
    (terms['loss_cls'] + terms['loss_box']).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.bbox_head.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in detector.bbox_head.parameters())


def test_a_head_that_decodes_otherwise_goes_to_the_fallback(detector, monkeypatch):
    class Own(DETRHead):
        def predict_by_feat(self, *args, **kwargs):
            return super().predict_by_feat(*args, **kwargs)

    detector.bbox_head.__class__ = type('Own', (Own,), {})
    layers = (torch.zeros(2, 1, 20, 3), torch.zeros(2, 1, 20, 4))
    assert align_head(detector.bbox_head, layers, [{}]).raw is not None


def test_softmax_heads_keep_their_background(monkeypatch):
    architectures.register(monkeypatch)
    head = tiny_detector('deformable_detr').bbox_head
    head.loss_cls.use_sigmoid = False
    layers = (torch.zeros(2, 1, 20, 4), torch.rand(2, 1, 20, 4))
    aligned = align_head(head, layers, [dict(img_shape=(48, 64))])
    assert aligned.activation == 'softmax' and torch.allclose(aligned.confidence(), torch.tensor(0.25))
