"""Candidates of constant shape are those that mmdet's heads find, before anything is suppressed."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from tiny_heads import POINTS, common, one_stage_heads

from mmdet_ptq.deploy.onnx.end2end.decoding import (
    GflDecoding,
    LevelDecoding,
    ProposalDecoding,
    YoloxDecoding,
    decoding_of,
)
from mmdet_ptq.testing import NUM_CLASSES

# more and fewer places on the second level than the limit takes, and an odd one
GRIDS = [(8, 6), (4, 3), (1, 2)]
IMAGES = [(64, 48), (50, 41)]
CONFIG = dict(nms_pre=40, min_bbox_size=0, score_thr=0.5, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10)
COMMON = common(8)
DELTA = dict(type='DeltaXYWHBBoxCoder', target_means=[0.1, 0, 0, 0.2], target_stds=[0.1, 0.1, 0.2, 0.3])
SQUARES = dict(POINTS, ratios=[0.5, 1.0, 2.0])
SOFTMAX = dict(type='CrossEntropyLoss', use_sigmoid=False)
HEADS = dict(
    one_stage_heads(8, DELTA),
    retinanet=dict(COMMON, type='RetinaHead', anchor_generator=SQUARES, bbox_coder=DELTA),
    softmax=dict(COMMON, type='RetinaHead', anchor_generator=SQUARES, bbox_coder=DELTA, loss_cls=SOFTMAX),
    unclipped=dict(
        COMMON,
        type='RetinaHead',
        anchor_generator=SQUARES,
        bbox_coder=dict(DELTA, clip_border=False, add_ctr_clamp=True),
    ),
    rpn=dict(
        type='RPNHead',
        in_channels=8,
        feat_channels=8,
        anchor_generator=SQUARES,
        bbox_coder=DELTA,
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
    ),
)


def head_of(kind, **test_cfg):
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    cfg = dict(CONFIG, **test_cfg)
    if kind == 'rpn':  # mmdet gives its candidates only once they are suppressed: nothing overlaps by more than all
        cfg.update(nms=dict(type='nms', iou_threshold=1.0), max_per_img=10**4)
    return MODELS.build(ConfigDict(copy.deepcopy(HEADS[kind]), test_cfg=cfg)).eval()


def outputs_of(head, seed=0):
    """Raw outputs of two images, in the shapes that a head's own layers give."""
    with torch.no_grad():
        channels = getattr(head, 'in_channels', 8)
        width = channels[0] if isinstance(channels, (tuple, list)) else channels
        shapes = head([torch.zeros(2, width, *grid) for grid in GRIDS])
    generator = torch.Generator().manual_seed(seed)
    outputs = [[torch.randn(level.shape, generator=generator) * 2 for level in maps] for maps in shapes]
    if type(head).__name__ in ('FCOSHead', 'RTMDetSepBNHead'):  # they give distances in pixels
        outputs[1] = [level.abs() * 6 for level in outputs[1]]
    return outputs


def expected(head, outputs):
    """What mmdet finds, best first."""
    metas = [dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)) for size in IMAGES]
    names = {3: 'objectnesses' if type(head).__name__ == 'YOLOXHead' else 'score_factors'}
    given = dict(cls_scores=outputs[0], bbox_preds=outputs[1], batch_img_metas=metas)
    given |= {names[3]: outputs[2]} if len(outputs) == 3 else {}
    with torch.no_grad():
        return head.predict_by_feat(
            **copy.deepcopy(given), cfg=head.test_cfg, rescale=False, with_nms=type(head).__name__ == 'RPNHead'
        )


def decoded(head, outputs, kind=None):
    border = torch.tensor([[width, height, width, height] for height, width in IMAGES]).float()[:, None]
    with torch.no_grad():
        return (kind or decoding_of(head))(head, GRIDS)(outputs, border)


def check(found, instances, labels=True):
    boxes, scores = found.boxes, found.scores
    assert (
        boxes.shape == (*scores.shape, 4) and found.labels.shape == scores.shape and found.labels.dtype == torch.int64
    )
    for image, theirs in enumerate(instances):
        order = scores[image].argsort(descending=True)[: (scores[image] > 0).sum()]
        best = theirs.scores.argsort(descending=True)
        assert len(order) == len(best) > 3
        torch.testing.assert_close(scores[image][order], theirs.scores[best], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(boxes[image][order], theirs.bboxes[best], rtol=1e-4, atol=1e-3)
        if labels:
            assert found.labels[image][order].equal(theirs.labels[best])


@pytest.mark.parametrize(
    'test_cfg',
    [{}, dict(nms_pre=7, score_thr=0.1), dict(nms_pre=10**4, score_thr=0.01), dict(min_bbox_size=9)],
    ids=['some', 'few', 'all', 'large'],
)
@pytest.mark.parametrize('kind', [kind for kind in HEADS if kind != 'rpn'])
def test_candidates_are_mmdets(kind, test_cfg):
    head = head_of(kind, **test_cfg)
    outputs = outputs_of(head)
    check(decoded(head, outputs), expected(head, outputs))


def test_without_a_limit_every_prior_has_a_candidate_of_each_class():
    head = head_of('fcos', nms_pre=-1, score_thr=0.0, min_bbox_size=-1)
    found = decoded(head, outputs_of(head))
    priors = sum(height * width for height, width in GRIDS)
    assert found.scores.shape == (2, priors * NUM_CLASSES) and (found.scores > 0).all()
    assert found.labels[1].bincount().tolist() == [priors] * NUM_CLASSES


@pytest.mark.parametrize('kind', ['retinanet', 'yolox'])
def test_what_is_below_the_threshold_has_no_score(kind):
    head = head_of(kind, score_thr=1.0)
    assert not decoded(head, outputs_of(head)).scores.any()


def test_sizes_of_candidates_are_those_within_the_image():
    head = head_of('retinanet', nms_pre=-1, score_thr=0.0, min_bbox_size=30)
    found = decoded(head, outputs_of(head))
    for (height, width), boxes, scores in zip(IMAGES, found.boxes, found.scores, strict=True):
        assert boxes.min() >= 0 and boxes[:, 2].max() == width and boxes[:, 3].max() == height
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (scores > 0).equal((sides > 30).all(1)) and 0 < (scores > 0).sum() < len(scores)


@pytest.mark.parametrize('nms_pre', [10, -1])
def test_proposals_are_mmdets_and_labels_are_their_levels(nms_pre):
    head = head_of('rpn', nms_pre=nms_pre)
    outputs = outputs_of(head)
    found = decoded(head, outputs, ProposalDecoding)
    check(found, expected(head, outputs), labels=False)
    places = [3 * height * width for height, width in GRIDS]
    counts = [min(nms_pre, count) if nms_pre > 0 else count for count in places]
    assert found.labels[0].bincount().tolist() == counts


KNOWN = dict.fromkeys(HEADS, LevelDecoding) | dict(gfl=GflDecoding, yolox=YoloxDecoding, rpn=None)


@pytest.mark.parametrize('kind', KNOWN)
def test_heads_are_told_apart_by_their_methods(kind):
    head = head_of(kind)
    assert decoding_of(head) is KNOWN[kind]
    assert ProposalDecoding.decodes(head) == (kind == 'rpn')


@pytest.mark.parametrize(
    'kind, method',
    [
        *(
            (kind, method)
            for kind in ('fcos', 'yolox')
            for method in ('predict', 'predict_by_feat', '_bbox_post_process')
        ),
        ('gfl', 'anchor_center'),
        ('yolox', '_bbox_decode'),
        ('rpn', '_predict_by_feat_single'),
    ],
)
def test_a_head_with_a_method_of_its_own_is_no_known_one(kind, method):
    head = head_of(kind)
    head.__class__ = type('Own', (type(head),), {method: lambda self, *args, **kwargs: None})
    assert decoding_of(head) is None and not ProposalDecoding.decodes(head)
