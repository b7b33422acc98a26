"""Every adapter against mmdet's own decoding of the same outputs, prior by prior."""

import numpy as np
import pytest
import torch
from mmdet.models import dense_heads
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

from mmdet_ptq.calibration.global_loss import FilteredGlobalLoss
from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.predictions import align_head

IMAGE = (64, 96)
CFG = ConfigDict(
    nms_pre=10**6,
    score_thr=-1.0,
    conf_thr=-1.0,
    nms=dict(type='nms', iou_threshold=1.0),
    max_per_img=10**6,
    min_bbox_size=-1,
)
GN = dict(type='GN', num_groups=2)
SQUARE = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16])
THREE = dict(type='AnchorGenerator', scales=[4, 6], ratios=[0.5, 1.0, 2.0], strides=[8, 16])
DELTA = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
POINTS = dict(type='MlvlPointGenerator', offset=0, strides=[8, 16])
SOFTMAX = dict(type='CrossEntropyLoss', use_sigmoid=False)
SIGMOID = dict(type='CrossEntropyLoss', use_sigmoid=True)
FOCAL = dict(type='FocalLoss', use_sigmoid=True)
QUALITY = dict(type='QualityFocalLoss', use_sigmoid=True)
BASE = dict(num_classes=3, in_channels=8, feat_channels=8)
ANCHORS = dict(BASE, stacked_convs=1, anchor_generator=THREE, bbox_coder=DELTA, loss_cls=SIGMOID)
SQUARES = dict(BASE, stacked_convs=1, anchor_generator=SQUARE, norm_cfg=GN, loss_cls=SIGMOID)
POINT = dict(BASE, stacked_convs=1, strides=[8, 16], norm_cfg=GN)

HEADS = {
    'ssd': dict(
        type='SSDHead',
        num_classes=3,
        in_channels=(8, 8),
        bbox_coder=DELTA,
        anchor_generator=dict(
            type='SSDAnchorGenerator',
            scale_major=False,
            input_size=96,
            strides=[8, 16],
            ratios=([2], [2, 3]),
            min_sizes=[12, 24],
            max_sizes=[24, 48],
        ),
    ),
    'anchor': dict(BASE, type='AnchorHead', anchor_generator=THREE),
    'retina': dict(ANCHORS, type='RetinaHead'),
    'retina-softmax': dict(ANCHORS, type='RetinaHead', loss_cls=SOFTMAX),
    'retina-decoded': dict(ANCHORS, type='RetinaHead', reg_decoded_bbox=True),
    'retina-sepbn': dict(ANCHORS, type='RetinaSepBNHead', num_ins=2),
    'free-anchor': dict(ANCHORS, type='FreeAnchorRetinaHead', loss_cls=FOCAL),
    'pisa-retina': dict(ANCHORS, type='PISARetinaHead'),
    'fsaf': dict(
        ANCHORS,
        type='FSAFHead',
        anchor_generator=SQUARE,
        reg_decoded_bbox=True,
        bbox_coder=dict(type='TBLRBBoxCoder', normalizer=4.0),
    ),
    'rpn': dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=THREE, bbox_coder=DELTA),
    'rpn-softmax': dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=THREE, loss_cls=SOFTMAX),
    'yolof': dict(
        type='YOLOFHead',
        num_classes=3,
        in_channels=8,
        reg_decoded_bbox=True,
        loss_cls=FOCAL,
        anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], scales=[1, 2, 4], strides=[8, 16]),
        bbox_coder=dict(DELTA, add_ctr_clamp=True, ctr_clamp=4),
    ),
    'atss': dict(SQUARES, type='ATSSHead', bbox_coder=DELTA),
    'paa': dict(SQUARES, type='PAAHead', bbox_coder=DELTA, score_voting=False),
    'ddod': dict(SQUARES, type='DDODHead', bbox_coder=DELTA),
    'gfl': dict(SQUARES, type='GFLHead', reg_max=6, loss_cls=QUALITY),
    'tood': dict(
        BASE,
        type='TOODHead',
        stacked_convs=2,
        norm_cfg=GN,
        num_dcn=0,
        anchor_type='anchor_free',
        anchor_generator=SQUARE,
        bbox_coder=DELTA,
    ),
    'rtmdet': dict(
        BASE,
        type='RTMDetHead',
        stacked_convs=1,
        norm_cfg=GN,
        with_objectness=True,
        anchor_generator=POINTS,
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        loss_cls=QUALITY,
    ),
    'rtmdet-sepbn': dict(
        BASE,
        type='RTMDetSepBNHead',
        stacked_convs=1,
        with_objectness=False,
        exp_on_reg=True,
        anchor_generator=POINTS,
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        loss_cls=QUALITY,
    ),
    'fcos': dict(POINT, type='FCOSHead'),
    'fcos-normed': dict(POINT, type='FCOSHead', norm_on_bbox=True, centerness_on_reg=True),
    'nas-fcos': dict(POINT, type='NASFCOSHead', norm_on_bbox=True),
    'centernet-update': dict(POINT, type='CenterNetUpdateHead'),
    'autoassign': dict(POINT, type='AutoAssignHead', loss_bbox=dict(type='GIoULoss', loss_weight=5.0)),
    'vfnet': dict(
        POINT,
        type='VFNetHead',
        regress_ranges=((-1, 64), (64, 1e8)),
        anchor_generator=dict(SQUARE, center_offset=0.0),
        loss_cls=dict(type='VarifocalLoss', use_sigmoid=True),
    ),
    'fovea': dict(POINT, type='FoveaHead', base_edge_list=[16, 32], scale_ranges=((1, 32), (16, 64))),
    'reppoints': dict(
        BASE, type='RepPointsHead', stacked_convs=1, point_feat_channels=8, point_strides=[8, 16], norm_cfg=GN
    ),
    'yolox': dict(BASE, type='YOLOXHead', stacked_convs=1, strides=(8, 16)),
    'yolov3': dict(
        type='YOLOV3Head',
        num_classes=3,
        in_channels=[8, 8],
        out_channels=[8, 8],
        featmap_strides=[8, 16],
        anchor_generator=dict(
            type='YOLOAnchorGenerator', base_sizes=[[(10, 13), (16, 30)], [(30, 61), (62, 45)]], strides=[8, 16]
        ),
    ),
}


def build(name):
    """A head with random weights, and features for two images on strides 8 and 16."""
    torch.manual_seed(0)
    head = MODELS.build(dict(HEADS[name], test_cfg=CFG)).eval()
    if name == 'ssd' and not hasattr(head, 'loss_cls'):
        head.loss_cls = None  # mmdet 3.3.0 reads it while decoding and never sets it (mmdetection issue 11780)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return head, [torch.randn(2, 8, IMAGE[0] // s, IMAGE[1] // s, requires_grad=True) for s in (8, 16)]


def probabilities(aligned):
    if aligned.activation == 'softmax':
        return aligned.cls_logits.softmax(-1)[..., :-1]
    return aligned.cls_logits.sigmoid()


def pairs_in_mmdet_order(name, aligned, i):
    """Rows of (score, class, box) of image i in the order in which mmdet's method lists its candidates."""
    prob, boxes = probabilities(aligned)[i], aligned.boxes[i]
    factor = torch.ones_like(boxes[:, 0]) if aligned.quality_logits is None else aligned.quality_logits[i].sigmoid()
    if name == 'yolox':  # the best class of every prior, in the order of the priors
        best, label = prob.max(1)
        return best * factor, label, boxes
    # mmdet sorts (prior, class) pairs by class probability, level by level; NMS sorts by score at the end
    sizes = (len(prob),) if name == 'yolov3' else aligned.level_sizes
    scores, labels, picked = [], [], []
    start = 0
    for size in sizes:
        order = prob[start : start + size].flatten().argsort(descending=True)
        prior = start + order // prob.shape[1]
        scores.append(prob[prior, order % prob.shape[1]] * factor[prior])
        labels.append(order % prob.shape[1])
        picked.append(boxes[prior])
        start += size
    score, label, box = torch.cat(scores), torch.cat(labels), torch.cat(picked)
    if name == 'paa' or name.startswith('rpn'):
        order = score.argsort(descending=True)
        score, label, box = score[order], label[order], box[order]
    return (score.sqrt() if name == 'paa' else score), label, box


def clipped(name, boxes):
    """What mmdet does to boxes after decoding, and an adapter does not."""
    if name in ('yolox', 'yolov3', 'tood'):
        return boxes
    height, width = (IMAGE[0] - 1, IMAGE[1] - 1) if name == 'fovea' else IMAGE
    return torch.stack(
        [
            boxes[:, 0].clamp(0, width),
            boxes[:, 1].clamp(0, height),
            boxes[:, 2].clamp(0, width),
            boxes[:, 3].clamp(0, height),
        ],
        1,
    )


def lexical_order(score, box):
    return torch.from_numpy(np.lexsort((box[:, 1].numpy(), box[:, 0].numpy(), score.numpy())))


@pytest.mark.parametrize('name', HEADS)
def test_scores_and_boxes_are_those_of_mmdet(name):
    head, feats = build(name)
    metas = [dict(img_shape=IMAGE, pad_shape=IMAGE, scale_factor=(1.0, 1.0))] * 2
    with torch.no_grad():
        outputs = head(feats)
        aligned = align_head(head, outputs, metas)
        with_nms = name == 'paa' or name.startswith('rpn')  # these two have no way around it
        results = head.predict_by_feat(*outputs, batch_img_metas=metas, cfg=CFG, rescale=False, with_nms=with_nms)
    assert aligned.raw is None
    assert sum(aligned.level_sizes) == aligned.cls_logits.shape[1] == aligned.boxes.shape[1]
    assert len(aligned.level_sizes) == 2
    for i, result in enumerate(results):
        score, label, box = pairs_in_mmdet_order(name, aligned, i)
        box, found = clipped(name, box), result.bboxes
        assert len(result.scores) == len(score) > 0
        if with_nms:  # equal scores come in any order
            a, b = lexical_order(score, box), lexical_order(result.scores, found)
            score, label, box, found, result = score[a], label[a], box[a], found[b], result[b]
        torch.testing.assert_close(score, result.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(box, found, rtol=1e-4, atol=1e-3)
        assert torch.equal(label, result.labels)


@pytest.mark.parametrize('name', HEADS)
def test_gradients_reach_every_part_of_the_outputs(name):
    head, feats = build(name)
    aligned = align_head(head, head(feats), [{}, {}])
    for part in (aligned.cls_logits, aligned.boxes, aligned.quality_logits, aligned.distributions):
        if part is not None:
            grads = torch.autograd.grad((part * torch.randn_like(part)).sum(), feats, retain_graph=True)
            for grad in grads:  # one per level: no level is left out
                assert torch.isfinite(grad).all() and grad.abs().max() > 0


@pytest.mark.parametrize('name', ['yolox', 'yolov3'])
def test_boxes_of_infinite_size_have_finite_losses_and_gradients(name):
    """Sizes are exponentials there, and overflow in a detector that was not trained for such an image."""
    head, feats = build(name)
    with torch.no_grad():
        outputs = head(feats)
    maps = outputs[1 if name == 'yolox' else 0]
    for one in maps:
        one[:, 2:4] = 200.0
        one.requires_grad_()
    student = align_head(head, outputs, [{}, {}])
    loss = FilteredGlobalLoss(GlobalLossConfig(score_thr=0.0, iou_thr=0.0))
    terms = loss(student, align_head(head, [[one + 0.1 for one in level] for level in outputs], [{}, {}]))
    total = sum(value for key, value in terms.items() if key.startswith('loss'))
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(one.grad).all() for one in maps)


def test_a_level_occupies_its_own_block_of_priors():
    head, feats = build('atss')
    with torch.no_grad():
        before = align_head(head, head(feats), [{}, {}])
        changed = align_head(head, head([feats[0], feats[1] + 1]), [{}, {}])
    first = before.level_sizes[0]
    for name in ('cls_logits', 'boxes', 'quality_logits'):
        a, b = getattr(before, name), getattr(changed, name)
        assert torch.equal(a[:, :first], b[:, :first])
        assert not torch.isclose(a[:, first:], b[:, first:]).all()


def test_half_precision_outputs_are_decoded_in_float32():
    head, feats = build('retina')
    with torch.no_grad():
        outputs = tuple([m.half() for m in maps] for maps in head(feats))
        aligned = align_head(head, outputs, [{}, {}])
    assert aligned.boxes.dtype == aligned.cls_logits.dtype == torch.float32


@pytest.mark.parametrize(
    'name',
    [
        'SABLRetinaHead',
        'GARetinaHead',
        'GARPNHead',
        'StageCascadeRPNHead',
        'YOLACTHead',
        'CondInstBboxHead',
        'ATSSVLFusionHead',
        'CenterNetHead',
        'CornerHead',
        'DDQDETRHead',
    ],
)
def test_heads_that_decode_otherwise_go_to_the_fallback(name):
    cls = getattr(dense_heads, name)
    outputs = ([torch.ones(1, 2)], {'b': torch.zeros(3)}, 'text', torch.ones(2, dtype=torch.long))
    aligned = align_head(cls.__new__(cls), outputs, [{}])
    assert [t.shape for t in aligned.raw] == [(1, 2), (3,)]


def test_scores_of_a_custom_classification_loss_go_to_the_fallback():
    head, feats = build('retina')
    head.loss_cls.custom_cls_channels = True
    assert align_head(head, head(feats), [{}, {}]).raw is not None
