import copy
import functools
from dataclasses import replace

import pytest
import torch
from architectures import semi_supervised
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from mmdet.models.roi_heads import CascadeRoIHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import MODEL_WRAPPERS
from mmengine.structures import InstanceData

from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import (
    align_head,
    check_raw_outputs,
    dispatch,
    needs_reference,
    predict_aligned,
    raw_predictions,
    two_stage,
)
from mmdet_ptq.predictions.samples import with_annotations
from mmdet_ptq.testing import tiny_batch, tiny_detector

IMAGE = (64, 96)
BACKBONE = dict(
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=8,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(1, 2),
        norm_cfg=dict(type='BN'),
    ),
    neck=dict(type='FPN', in_channels=[16, 32], out_channels=8, num_outs=2),
)
ANCHORS = dict(type='AnchorGenerator', scales=[2, 4], ratios=[0.5, 1.0], strides=[8, 16])
BOX_HEAD = dict(type='Shared2FCBBoxHead', in_channels=8, fc_out_channels=16, roi_feat_size=3, num_classes=3)
ROI_HEAD = dict(
    type='StandardRoIHead',
    bbox_roi_extractor=dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=0),
        out_channels=8,
        featmap_strides=[8, 16],
    ),
    bbox_head=BOX_HEAD,
)
TEST_CFG = ConfigDict(
    rpn=dict(nms_pre=50, max_per_img=100, nms=dict(type='nms', iou_threshold=0.5), min_bbox_size=0),
    rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
)


def randomised(config):
    torch.manual_seed(0)
    detector = MODELS.build(dict(config, **BACKBONE)).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return detector


def retina():
    return randomised(
        dict(
            type='RetinaNet',
            test_cfg=TEST_CFG.rcnn,
            bbox_head=dict(
                type='RetinaHead',
                num_classes=3,
                in_channels=8,
                feat_channels=8,
                stacked_convs=1,
                anchor_generator=ANCHORS,
            ),
        )
    )


def faster_rcnn(**changes):
    return randomised(
        dict(
            type='FasterRCNN',
            train_cfg=None,
            test_cfg=TEST_CFG,
            rpn_head=dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=ANCHORS),
            roi_head=dict(ROI_HEAD, **changes),
        )
    )


@pytest.fixture
def batch():
    torch.manual_seed(1)
    samples = [DetDataSample(metainfo=dict(img_shape=IMAGE, scale_factor=(1.0, 1.0))) for _ in range(2)]
    return torch.randn(2, 3, *IMAGE) * torch.tensor([0.2, 3.0]).view(2, 1, 1, 1), samples


def test_single_stage_runs_the_root_module_once(batch):
    detector, calls = retina(), []
    detector.register_forward_pre_hook(lambda *args: calls.append(1))
    aligned = predict_aligned(detector, *batch)
    assert len(calls) == 1
    outputs = detector.bbox_head(detector.extract_feat(batch[0]))
    expected = align_head(detector.bbox_head, outputs, [{}, {}])
    assert torch.equal(aligned.boxes, expected.boxes)
    assert torch.equal(aligned.cls_logits, expected.cls_logits)
    assert torch.equal(raw_predictions(detector, *batch)[1][0], outputs[1][0])


def test_a_data_parallel_wrapper_is_called_itself(batch):

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    MODEL_WRAPPERS.register_module(name='PredictionsTestWrapper', module=Wrapper, force=True)
    wrapper = Wrapper(retina())
    assert torch.equal(predict_aligned(wrapper, *batch).boxes, predict_aligned(wrapper.module, *batch).boxes)
    assert wrapper.calls == 1


def test_a_detector_with_its_own_forward_falls_back(batch, monkeypatch):
    messages = []
    monkeypatch.setattr(dispatch, 'print_log', lambda text, **kwargs: messages.append(text))
    dispatch.announce.cache_clear()
    detector = retina()

    class OwnForward(type(detector)):
        def _forward(self, batch_inputs, batch_data_samples=None):
            return {'features': self.extract_feat(batch_inputs)}

    detector.__class__ = OwnForward
    aligned = predict_aligned(detector, *batch)
    assert len(aligned.raw) == 2
    assert 'OwnForward' in messages[0]


def test_two_stage_boxes_and_scores_are_those_of_mmdet(batch):
    detector = faster_rcnn()
    with torch.no_grad():
        aligned = predict_aligned(detector, *batch)
        feats = detector.extract_feat(batch[0])
        proposals = [r.bboxes for r in detector.rpn_head.predict(feats, batch[1])]
        counts = [len(p) for p in proposals]
        assert counts[0] != counts[1], 'the test should see padding'
        results = detector.roi_head.bbox_head.predict_by_feat(
            *two_stage_outputs(detector, feats, aligned.regions.rois[0], counts), [s.metainfo for s in batch[1]]
        )
    assert torch.equal(aligned.regions.rois[0][:, 1:], torch.cat(proposals))
    for i, result in enumerate(results):
        label = result.scores[:, :-1].argmax(1)
        expected = result.bboxes.reshape(counts[i], 3, 4)[torch.arange(counts[i]), label]
        box = aligned.boxes[i, : counts[i]]
        clipped = torch.stack([box[:, 0::2].clamp(0, IMAGE[1]), box[:, 1::2].clamp(0, IMAGE[0])], 2).flatten(1)
        torch.testing.assert_close(clipped, expected)
        torch.testing.assert_close(aligned.cls_logits[i, : counts[i]].softmax(-1), result.scores)
        assert (aligned.confidence()[i, counts[i] :] < 1e-9).all()
    first = align_head(detector.rpn_head, detector.rpn_head(feats), [{}, {}])
    assert torch.equal(aligned.proposal_stage.boxes, first.boxes)


@pytest.mark.parametrize('taking', [False, True], ids=['cascade rpn', 'sparse r-cnn'])
def test_proposals_that_no_forward_makes(batch, monkeypatch, taking):
    messages = []
    monkeypatch.setattr(dispatch, 'print_log', lambda text, **kwargs: messages.append(text))
    dispatch.announce.cache_clear()
    detector = faster_rcnn()

    class OwnRPN(type(detector.rpn_head)):
        def predict(self, x, batch_data_samples, rescale=False):
            outs = type(self).forward(self, x)  # not called as a module
            found = self.predict_by_feat(*outs, batch_img_metas=[s.metainfo for s in batch_data_samples])
            for proposals in found:
                proposals.features = proposals.bboxes.clone()
            return found

    class TakingHead(type(detector.roi_head)):
        def forward(self, x, rpn_results_list, batch_data_samples=None):
            for proposals in rpn_results_list:
                proposals.pop('features')
            return super().forward(x, rpn_results_list, batch_data_samples)

    detector.rpn_head.__class__ = OwnRPN
    if taking:
        detector.roi_head.__class__ = TakingHead
    teacher = predict_aligned(detector, *batch)
    student = predict_aligned(detector, *batch, teacher)
    assert teacher.proposal_stage is None
    assert any('OwnRPN proposes without calling its own forward' in text for text in messages)
    pairs = zip(teacher.raw, student.raw, strict=True) if taking else [(teacher.cls_logits, student.cls_logits)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all('features' in proposals for proposals in teacher.regions.proposals)


def two_stage_outputs(detector, feats, rois, counts):
    out = detector.roi_head._bbox_forward(feats, rois)
    return rois.split(counts), out['cls_score'].split(counts), out['bbox_pred'].split(counts)


def test_the_student_answers_for_the_teachers_proposals_and_classes(batch):
    teacher = faster_rcnn()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        reference = predict_aligned(teacher, *batch)
        # the student's own proposals and best classes become others
        student.rpn_head.rpn_reg.bias.add_(0.5)
        student.rpn_head.rpn_cls.weight.neg_()
        assert not torch.equal(predict_aligned(student, *batch).regions.rois[0], reference.regions.rois[0])
    answer = predict_aligned(student, *batch, reference=reference)
    assert torch.equal(answer.regions.rois[0], reference.regions.rois[0])
    assert torch.equal(answer.cls_logits, reference.cls_logits)
    assert torch.equal(answer.boxes, reference.boxes)
    assert not torch.equal(answer.proposal_stage.boxes, reference.proposal_stage.boxes)
    other_classes = replace(reference, cls_logits=reference.cls_logits[..., [1, 2, 0, 3]])
    assert not torch.equal(predict_aligned(student, *batch, reference=other_classes).boxes, reference.boxes)
    for part in (answer.cls_logits, answer.boxes, answer.proposal_stage.cls_logits, answer.proposal_stage.boxes):
        assert torch.autograd.grad(part.sum(), student.neck.fpn_convs[0].conv.weight, retain_graph=True)[0].any()
    assert not student.rpn_head._forward_hooks and not student.roi_head.bbox_roi_extractor._forward_pre_hooks


def test_an_unknown_second_stage_leaves_the_first_and_says_so(batch, monkeypatch):
    messages = []
    monkeypatch.setattr(dispatch, 'print_log', lambda text, **kwargs: messages.append(text))
    dispatch.announce.cache_clear()
    detector = faster_rcnn(
        type='CascadeRoIHead',
        num_stages=2,
        stage_loss_weights=[1, 0.5],
        bbox_head=[dict(BOX_HEAD, reg_class_agnostic=True)] * 2,
    )
    own = functools.partialmethod(CascadeRoIHead._refine_roi)
    monkeypatch.setattr(detector.roi_head, '__class__', type('OwnCascade', (CascadeRoIHead,), dict(_refine_roi=own)))
    aligned = predict_aligned(detector, *batch)
    assert aligned.raw is None and aligned.activation == 'sigmoid' and aligned.cls_logits.shape[-1] == 1
    assert len(messages) == 1 and 'OwnCascade' in messages[0] and '_refine_roi' in messages[0]


def test_padding_keeps_images_apart():
    rois = torch.tensor([[0.0, 0, 0, 8, 8], [1, 0, 0, 4, 4], [1, 2, 2, 6, 6]])
    scores = torch.tensor([[1.0, 0], [2, 0], [3, 0]])
    aligned = two_stage.align_rois(None, scores, None, rois, 3, None)
    assert aligned.cls_logits[..., 0].tolist() == [[1, 0], [2, 3], [0, 0]]
    assert aligned.boxes is None


@pytest.mark.parametrize('part', ['teacher', 'student'])
@pytest.mark.parametrize('kind', ['faster_rcnn', 'retinanet'])
def test_a_semi_supervised_detector_answers_as_the_part_that_predicts(kind, part):
    other = 'student' if part == 'teacher' else 'teacher'
    # `forward_on` may say something else than `predict_on`
    wrapper = semi_supervised(kind, predict_on=part, forward_on=other)
    inner = tiny_detector(kind, seed=1)
    getattr(wrapper, part).load_state_dict(inner.state_dict())
    data = inner.data_preprocessor(tiny_batch(2), False)
    with torch.no_grad():
        expected = predict_aligned(inner, data['inputs'], copy.deepcopy(data['data_samples']))
        found = predict_aligned(wrapper, data['inputs'], copy.deepcopy(data['data_samples']))
        again = predict_aligned(wrapper, data['inputs'], copy.deepcopy(data['data_samples']), found)
    assert torch.equal(found.cls_logits, expected.cls_logits) and torch.equal(again.boxes, expected.boxes)
    assert needs_reference(wrapper) == (kind == 'faster_rcnn')
    assert wrapper.semi_test_cfg == dict(predict_on=part, forward_on=other)


def test_raw_outputs_that_need_annotated_objects_are_refused():
    class Masks(SingleStageInstanceSegmentor):
        """As YOLACT and CondInst: masks of the objects that the box head was trained with."""

        with_bbox, mask_head = True, None

        def __init__(self):
            torch.nn.Module.__init__(self)

    with pytest.raises(PTQError, match="annotated objects.*preset='w8a8_observe'"):
        check_raw_outputs(Masks())


def test_heads_that_ask_for_annotations_get_empty_ones():
    annotated = DetDataSample()
    annotated.gt_instances = InstanceData(bboxes=torch.ones(1, 4), labels=torch.ones(1))
    plain = DetDataSample(metainfo=dict(img_shape=IMAGE))
    first, second = with_annotations([annotated, plain])
    assert first is annotated and 'gt_instances' not in plain
    assert len(second.gt_instances) == 0 and second.img_shape == IMAGE
