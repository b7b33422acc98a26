"""Which detectors have two stages that can be aligned, and the boxes of RoIs, worked out again in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet.models.detectors import FasterRCNN, TridentFasterRCNN, TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead, Shared2FCBBoxHead
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import nn

from mmdet_ptq.predictions import AlignedPredictions, predict_aligned
from mmdet_ptq.predictions.two_stage import align_rois, is_two_stage, roi_problem
from mmdet_ptq.testing import tiny_batch, tiny_detector

STDS = (0.1, 0.1, 0.2, 0.2)


def made(cls: type, **attributes) -> nn.Module:
    """A module of a class without what its constructor builds."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class OwnForward(FasterRCNN):
    def _forward(self, batch_inputs, batch_data_samples=None):
        return super()._forward(batch_inputs, batch_data_samples)


class OwnTrident(TridentFasterRCNN):
    pass


@pytest.mark.parametrize(
    'detector, expected',
    [
        (made(TwoStageDetector), True),
        (made(FasterRCNN), True),
        (made(OwnForward), False),
        (made(TridentFasterRCNN, test_branch_idx=1), True),
        (made(OwnTrident, test_branch_idx=0), True),
        # predicts with all its branches at once
        (made(TridentFasterRCNN, test_branch_idx=-1), False),
        (nn.Conv2d(1, 1, 1), False),
    ],
    ids=['base', 'faster r-cnn', 'own forward', 'trident', 'own trident', 'all branches', 'none'],
)
def test_two_stages_are_told_by_how_they_run(detector, expected):
    assert is_two_stage(detector) == expected


# ------------------------------------------------------------------ heads


def box_head(cls: type = Shared2FCBBoxHead, **options) -> nn.Module:
    return cls(in_channels=2, fc_out_channels=3, roi_feat_size=1, num_classes=3, **options)


class OwnBoxes(StandardRoIHead):
    def _bbox_forward(self, x, rois):
        return super()._bbox_forward(x, rois)


class OwnRefining(CascadeRoIHead):
    def _refine_roi(self, *args, **kwargs):
        return super()._refine_roi(*args, **kwargs)


class OwnLoss(StandardRoIHead):
    def loss(self, *args, **kwargs):
        return {}


class OwnDecoding(Shared2FCBBoxHead):
    def predict_by_feat(self, *args, **kwargs):
        return super().predict_by_feat(*args, **kwargs)


class Stranger(nn.Module):
    custom_cls_channels = False


@pytest.mark.parametrize(
    'head, problem',
    [
        (made(StandardRoIHead, bbox_head=box_head()), None),
        (made(OwnLoss, bbox_head=box_head()), None),
        (made(CascadeRoIHead, bbox_head=nn.ModuleList([box_head(), box_head()])), None),
        (made(OwnBoxes, bbox_head=box_head()), 'it runs its boxes in another way than StandardRoIHead (_bbox_forward)'),
        (
            made(OwnRefining, bbox_head=nn.ModuleList([box_head()])),
            'it runs its boxes in another way than CascadeRoIHead (_refine_roi)',
        ),
        (made(nn.Identity, bbox_head=box_head()), 'it runs its boxes in another way than StandardRoIHead (forward)'),
        (made(StandardRoIHead, bbox_head=box_head(OwnDecoding)), 'OwnDecoding decodes in another way than BBoxHead'),
        (made(StandardRoIHead, bbox_head=Stranger()), 'Stranger decodes in another way than BBoxHead'),
        (
            made(CascadeRoIHead, bbox_head=nn.ModuleList([box_head(), box_head(OwnDecoding)])),
            'OwnDecoding decodes in another way than BBoxHead',
        ),
        (
            made(StandardRoIHead, bbox_head=box_head(loss_cls=dict(type='SeesawLoss', num_classes=3))),
            'its scores come from the activation of a custom classification loss',
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)
def test_why_a_head_cannot_be_aligned_is_told(head, problem):
    assert roi_problem(head) == problem


# ------------------------------------------------------------------ RoIs


ROIS = torch.tensor([[0.0, 0, 0, 10, 20], [0, 4, 4, 8, 8], [0, 5, 1, 6, 3], [2, 0, 0, 30, 10], [2, 10, 10, 12, 20]])
PLACES = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]


def decoded(roi: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """Centre and size of a box moved by deltas, as R-CNN does."""
    dx, dy, dw, dh = deltas * STDS
    (x1, y1, x2, y2), (cx, cy) = roi, ((roi[0] + roi[2]) / 2, (roi[1] + roi[3]) / 2)
    cx, cy = cx + dx * (x2 - x1), cy + dy * (y2 - y1)
    w, h = (x2 - x1) * np.exp(dw), (y2 - y1) * np.exp(dh)
    return np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])


def coder() -> nn.Module:
    return made(BBoxHead, bbox_coder=DeltaXYWHBBoxCoder(target_stds=STDS))


@pytest.mark.parametrize('classes', [1, 3])
def test_a_roi_has_the_box_of_its_best_class(classes):
    """Or of none, where one box stands for all; a background that is surer than they is no class."""
    scores = torch.randn(5, 4)
    scores[:, 3] = 10
    deltas = torch.randn(5, 4 * classes)
    aligned = align_rois(coder(), scores, deltas, ROIS, 3, None)
    assert aligned.boxes.shape == (3, 3, 4) and aligned.level_sizes == (3,) and aligned.activation == 'softmax'
    for row, (image, position) in enumerate(PLACES):
        label = int(scores[row, :3].argmax()) if classes > 1 else 0
        expected = decoded(ROIS[row, 1:].numpy(), deltas[row, 4 * label : 4 * label + 4].numpy())
        np.testing.assert_allclose(aligned.boxes[image, position], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(aligned.cls_logits[image, position], scores[row])
    # what is left is padding, of no confidence: the second image has nothing else
    filled = torch.zeros(3, 3, dtype=torch.bool)
    filled[tuple(zip(*PLACES, strict=True))] = True
    assert (aligned.confidence()[~filled] < 1e-12).all() and not aligned.boxes[~filled].any()


@pytest.mark.parametrize('classes', [1, 3])
def test_no_rois_have_no_boxes(classes):
    aligned = align_rois(coder(), torch.empty(0, 4), torch.empty(0, 4 * classes), torch.empty(0, 5), 2, None)
    assert aligned.cls_logits.shape == (2, 0, 4) and aligned.boxes.shape == (2, 0, 4) and aligned.level_sizes == (0,)


def test_the_class_is_the_references():
    scores, deltas = torch.randn(5, 4), torch.randn(5, 12)
    teacher = align_rois(coder(), scores, deltas, ROIS, 3, None)
    turned = AlignedPredictions(cls_logits=teacher.cls_logits[..., [1, 2, 0, 3]], activation='softmax')
    answer = align_rois(coder(), scores, deltas, ROIS, 3, turned)
    assert torch.equal(answer.cls_logits, teacher.cls_logits)
    for row, (image, position) in enumerate(PLACES):
        label = int(scores[row, [1, 2, 0]].argmax())
        expected = decoded(ROIS[row, 1:].numpy(), deltas[row, 4 * label : 4 * label + 4].numpy())
        np.testing.assert_allclose(answer.boxes[image, position], expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_chosen_deltas_alone():
    scores = torch.tensor([[0.0, 5, 0, 0]] * 5, requires_grad=True)
    deltas = torch.randn(5, 12, requires_grad=True)
    aligned = align_rois(coder(), scores, deltas, ROIS, 3, None)
    (aligned.boxes.sum() + aligned.cls_logits.sum()).backward()
    touched = deltas.grad.reshape(5, 3, 4).abs().sum(-1) > 0
    assert touched[:, 1].all() and not touched[:, [0, 2]].any()
    assert torch.equal(scores.grad, torch.ones(5, 4))


# ------------------------------------------------------------------ the whole


def test_a_pass_that_fails_leaves_the_detector_as_it_was(monkeypatch):
    detector = tiny_detector('faster_rcnn')
    data = detector.data_preprocessor(tiny_batch(1), False)
    with torch.no_grad():
        before = predict_aligned(detector, data['inputs'], data['data_samples'])

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(detector.roi_head.bbox_head, 'forward', interrupt)
        predict_aligned(detector, data['inputs'], data['data_samples'])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in detector.modules())
    assert 'predict' not in vars(detector.rpn_head)
    with torch.no_grad():
        after = predict_aligned(detector, data['inputs'], data['data_samples'])
    assert torch.equal(after.boxes, before.boxes) and torch.equal(after.cls_logits, before.cls_logits)
