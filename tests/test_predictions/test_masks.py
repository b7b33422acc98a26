"""Masks as mmdet draws them, of the priors that the float detector is surest of, and their term of the global loss."""

import math

import architectures
import pytest
import torch
import torch.nn.functional as F
from mmdet.models import dense_heads
from mmdet.models.dense_heads import solo_head, solov2_head
from mmdet.models.test_time_augs import merge_aug_masks
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mmdet_ptq.calibration.fisher import noisy_loss
from mmdet_ptq.calibration.global_loss import FilteredGlobalLoss
from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import AlignedPredictions, Masks, align_head, predict_aligned
from mmdet_ptq.testing import tiny_detector

IMAGE = (64, 96)
GN = dict(type='GN', num_groups=2)
FOCAL = dict(type='FocalLoss', use_sigmoid=True)
BASE = dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1)
SOLO = dict(
    BASE,
    strides=[8, 8, 16, 32, 32],
    scale_ranges=((1, 16), (8, 32), (16, 64), (32, 128), (64, 256)),
    num_grids=[7, 6, 4, 3, 2],
    loss_mask=dict(type='DiceLoss', use_sigmoid=True, loss_weight=3.0),
    loss_cls=FOCAL,
    norm_cfg=GN,
)
V2 = dict(feat_channels=8, start_level=0, end_level=3, out_channels=8, mask_stride=4, norm_cfg=GN)
INS = dict(
    BASE,
    anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[8, 16, 32]),
    bbox_coder=dict(type='DistancePointBBoxCoder'),
    loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0),
    loss_bbox=dict(type='GIoULoss'),
    loss_mask=dict(type='DiceLoss', eps=5e-6, reduction='mean'),
    norm_cfg=dict(type='BN'),
)
HEADS = {
    'solo': dict(SOLO, type='SOLOHead'),
    'decoupled_solo': dict(SOLO, type='DecoupledSOLOHead'),
    'decoupled_solo_light': dict(SOLO, type='DecoupledSOLOLightHead'),
    'solov2': dict(SOLO, type='SOLOV2Head', mask_feature_head=V2),
    'rtmdet_ins': dict(INS, type='RTMDetInsHead'),
    'rtmdet_ins_sepbn': dict(INS, type='RTMDetInsSepBNHead', share_conv=True),
}
CFG = ConfigDict(
    nms_pre=10**4,
    score_thr=0.02,
    mask_thr=0.5,
    mask_thr_binary=0.5,
    filter_thr=-1,
    kernel='gaussian',
    sigma=2.0,
    nms=dict(type='nms', iou_threshold=0.6),
    max_per_img=50,
    min_bbox_size=-1,
)


def head_and_outputs(name, seed=0):
    torch.manual_seed(seed)
    cfg = ConfigDict(HEADS[name], test_cfg=CFG)
    head = MODELS.build(cfg).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=math.sqrt(2 / parameter[0].numel()))
    strides = (8, 16, 32) if 'ins' in name else (4, 8, 16, 32, 64)
    features = [torch.randn(2, 8, math.ceil(IMAGE[0] / s), math.ceil(IMAGE[1] / s)) for s in strides]
    return head, head(features)


def metas():
    return [dict(img_shape=IMAGE, ori_shape=IMAGE, scale_factor=(1.0, 1.0), batch_input_shape=IMAGE) for _ in range(2)]


@pytest.mark.parametrize('name', [name for name in HEADS if 'solo' in name])
@torch.no_grad()
def test_masks_of_cells_are_those_that_mmdet_thresholds(name, monkeypatch):
    head, outputs = head_and_outputs(name)
    seen = []
    for module in (solo_head, solov2_head):
        original = module.mask_matrix_nms

        def record(masks, labels, scores, *args, original=original, **kwargs):
            seen.append((masks, labels))
            return original(masks, labels, scores, *args, **kwargs)

        monkeypatch.setattr(module, 'mask_matrix_nms', record)
    aligned = align_head(head, outputs, metas())
    assert aligned.raw is None and aligned.boxes is None and aligned.level_sizes == (49, 36, 16, 9, 4)
    head.predict_by_feat(*outputs, batch_img_metas=metas())
    assert len(seen) == 2
    smallest = torch.cat([torch.full((size,), s) for size, s in zip(aligned.level_sizes, head.strides, strict=True)])
    for image, (masks, labels) in enumerate(seen):
        scores = aligned.cls_logits[image].sigmoid()
        if name == 'solov2':
            scores = scores * local_maxima(scores, aligned.level_sizes)
        cells, classes = (scores > CFG.score_thr).nonzero().unbind(1)
        drawn = aligned.masks.draw(torch.stack([torch.full_like(cells, image), cells], 1)) > 0
        large = drawn.sum((1, 2)) > smallest[cells]
        assert torch.equal(drawn[large], masks) and torch.equal(classes[large], labels) and len(masks) > 10


def local_maxima(scores, sizes):
    keep = []
    for level in scores.split(list(sizes)):
        grid = math.isqrt(len(level))
        maps = level.T.reshape(1, -1, grid, grid)
        keep.append((F.max_pool2d(maps, 2, stride=1, padding=1)[..., :-1, :-1] == maps)[0].flatten(1).T)
    return torch.cat(keep)


@pytest.mark.parametrize('name', ['rtmdet_ins', 'rtmdet_ins_sepbn'])
@torch.no_grad()
def test_masks_of_rtmdet_ins_are_those_of_the_priors_that_mmdet_keeps(name, monkeypatch):
    head, outputs = head_and_outputs(name)
    aligned = align_head(head, outputs, metas())
    seen, original = [], head._mask_predict_by_feat_single

    def record(features, kernels, priors):
        seen.append((priors, original(features, kernels, priors)))
        return seen[-1][1]

    monkeypatch.setattr(head, '_mask_predict_by_feat_single', record)
    head.predict_by_feat(*outputs, batch_img_metas=metas(), rescale=False)
    theirs = list(seen)
    sizes = [m.shape[-2:] for m in outputs[0]]
    everywhere = torch.cat(head.prior_generator.grid_priors(sizes, device='cpu', with_stride=True))
    for image, (priors, masks) in enumerate(theirs):
        chosen = (priors[:, None] == everywhere).all(-1).int().argmax(1)
        drawn = aligned.masks.draw(torch.stack([torch.full_like(chosen, image), chosen], 1))
        assert torch.equal(seen[-1][0], priors) and len(priors) > 5
        torch.testing.assert_close(drawn, masks)


def detector_of(kind, monkeypatch):
    architectures.register(monkeypatch)
    detector = tiny_detector(kind)
    data = detector.data_preprocessor(architectures.sized_batch(48, 64, seed=2), False)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(img_shape=(48, 64), batch_input_shape=(48, 64)))
    return detector, data


@torch.no_grad()
def test_masks_of_queries_are_those_of_mmdet(monkeypatch):
    detector, data = detector_of('mask2former', monkeypatch)
    aligned = predict_aligned(detector, data['inputs'], data['data_samples'])
    scores, masks = detector.panoptic_head.predict(detector.extract_feat(data['inputs']), data['data_samples'])
    torch.testing.assert_close(aligned.cls_logits, scores)
    assert aligned.activation == 'softmax' and aligned.level_sizes == (20,)
    rows = aligned.masks.most_confident(aligned.confidence())
    assert len(rows) == 40 and rows[:20, 0].eq(0).all()
    drawn = F.interpolate(aligned.masks.draw(rows)[None], masks.shape[-2:], mode='bilinear')[0]
    torch.testing.assert_close(drawn, masks[rows[:, 0], rows[:, 1]])


@torch.no_grad()
def test_masks_of_regions_are_of_the_surest_and_of_their_class(monkeypatch):
    detector, data = detector_of('mask_rcnn', monkeypatch)
    aligned = predict_aligned(detector, data['inputs'], data['data_samples'])
    boxes, regions = aligned.regions.rois
    rows = aligned.masks.rows
    counts = torch.bincount(boxes[:, 0].long())
    assert torch.equal(boxes[rows[:, 1] + rows[:, 0] * counts[0]], regions) and rows[:, 0].unique().tolist() == [0, 1]
    kept = aligned.confidence()[rows[:, 0], rows[:, 1]]
    left = torch.ones_like(aligned.confidence(), dtype=torch.bool)
    left[rows[:, 0], rows[:, 1]] = False
    assert not left.any() or kept.min() >= aligned.confidence()[left].max()
    theirs = detector.roi_head._mask_forward(detector.extract_feat(data['inputs']), regions)['mask_preds']
    labels = aligned.cls_logits[rows[:, 0], rows[:, 1], :-1].argmax(-1)
    assert labels.unique().numel() > 1
    asked = rows[::3]
    torch.testing.assert_close(aligned.masks.draw(asked), theirs[range(len(rows)), labels][::3])


@pytest.mark.parametrize('kind', ['mask_rcnn', 'cascade_rcnn'])
def test_where_nothing_is_proposed_the_image_is_the_region(kind, monkeypatch):
    detector, data = detector_of(kind, monkeypatch)
    propose = type(detector.rpn_head).predict
    monkeypatch.setattr(type(detector.rpn_head), 'predict', lambda *a, **k: [found[:0] for found in propose(*a, **k)])
    with torch.no_grad():
        teacher = predict_aligned(detector, data['inputs'], data['data_samples']).detach()
    student = predict_aligned(detector, data['inputs'], data['data_samples'], teacher)
    assert student.cls_logits.shape[:2] == (2, 1) and teacher.regions.rois[0].tolist() == [[0, 0, 0, 64, 48]]
    terms = FilteredGlobalLoss(GlobalLossConfig(score_thr=0.0))(student, teacher)
    assert terms['kept'] == 0.5 and all(abs(value) < 1e-6 for name, value in terms.items() if 'loss' in name)
    sum(value for name, value in terms.items() if 'loss' in name).backward()


@torch.no_grad()
def test_a_cascade_has_its_mean_scores_and_last_boxes(monkeypatch):
    detector, data = detector_of('cascade_rcnn', monkeypatch)
    aligned = predict_aligned(detector, data['inputs'], data['data_samples'])
    assert aligned.raw is None and aligned.proposal_stage is not None and len(aligned.regions.rois) == 2
    features, samples = detector.extract_feat(data['inputs']), [s.metainfo for s in data['data_samples']]
    rois, scores, deltas = detector.roi_head._refine_roi(
        features, aligned.regions.rois[0], samples, [len(p) for p in aligned.regions.proposals]
    )
    for image in range(2):
        size = len(scores[image])
        torch.testing.assert_close(aligned.cls_logits[image, :size], scores[image])
        boxes = detector.roi_head.bbox_head[-1].bbox_coder.decode(rois[image][:, 1:], deltas[image])
        torch.testing.assert_close(aligned.boxes[image, :size], boxes)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['cascade_mask_rcnn', 'htc'])
def test_masks_of_a_cascade_are_the_mean_of_its_stages(kind, monkeypatch):
    detector, data = detector_of(kind, monkeypatch)
    aligned = predict_aligned(detector, data['inputs'], data['data_samples'])
    features, rows, rois = detector.extract_feat(data['inputs']), aligned.masks.rows, aligned.regions.rois[-1]
    assert 0 < len(rows) == len(rois) <= 100
    counts = torch.bincount(aligned.regions.rois[1][:, 0].long())
    assert torch.equal(aligned.regions.rois[1][rows[:, 1] + rows[:, 0] * counts[0]], rois)
    if kind == 'htc':
        stages = detector.roi_head._mask_forward(-1, features, rois, training=False)['mask_preds']
    else:
        stages = [detector.roi_head._mask_forward(stage, features, rois)['mask_preds'] for stage in range(2)]
    merged = merge_aug_masks([stage.sigmoid() for stage in stages], {})
    labels = aligned.cls_logits[rows[:, 0], rows[:, 1], :-1].argmax(-1)
    torch.testing.assert_close(aligned.masks.draw(rows).sigmoid(), merged[range(len(rows)), labels])
    assert '_mask_forward' not in vars(detector.roi_head)
    again = predict_aligned(detector, data['inputs'], data['data_samples'], aligned)
    torch.testing.assert_close(again.masks.draw(rows), aligned.masks.draw(rows))


@torch.no_grad()
@pytest.mark.parametrize('kind', ['yolact', 'condinst'])
def test_masks_of_prototypes_are_those_of_mmdet_and_need_no_annotations(kind, monkeypatch):
    detector, data = detector_of(kind, monkeypatch)
    kept, process = [], type(detector.bbox_head)._bbox_post_process
    monkeypatch.setattr(
        type(detector.bbox_head),
        '_bbox_post_process',
        lambda self, *args, **told: kept.append(told) or process(self, *args, **told),
    )
    aligned = predict_aligned(detector, data['inputs'], data['data_samples'])
    assert aligned.raw is None and '_forward' not in vars(detector)
    features = detector.extract_feat(data['inputs'])
    detector.test_cfg.nms_pre = detector.bbox_head.test_cfg.nms_pre = -1
    detector.bbox_head.predict(features, data['data_samples'], rescale=False)
    border = aligned.boxes.new_tensor([64, 48, 64, 48])
    outputs = detector.bbox_head(features)
    sizes = [m.shape[-2:] for m in outputs[0]]
    with_stride = dict(with_stride=True) if kind == 'condinst' else {}
    places = torch.cat(detector.bbox_head.prior_generator.grid_priors(sizes, device='cpu', **with_stride))
    for image, told in enumerate(kept):
        boxes = aligned.boxes[image].clamp(min=0).minimum(border)
        if kind == 'yolact':
            torch.testing.assert_close(boxes, told['multi_bboxes'])
            torch.testing.assert_close(aligned.cls_logits[image].softmax(-1), told['multi_scores'])
        else:  # a row for each class of each place, the surest first
            found = told['results']
            same = (torch.cat([found.points, found.strides[:, None]], 1)[:, None] == places[:, :3]).all(-1)
            place = same.int().argmax(1)
            torch.testing.assert_close(boxes[place], found.bboxes)
            quality = aligned.quality_logits[image].sigmoid()[place]
            torch.testing.assert_close(aligned.cls_logits[image].sigmoid()[place, found.labels] * quality, found.scores)
    asked = torch.tensor([[0, 3], [0, 40], [1, 7]])
    drawn = aligned.masks.draw(asked)
    number = detector.bbox_head.num_protos if kind == 'yolact' else detector.bbox_head.num_params
    numbers = torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, number) for m in outputs[-1]], 1)
    if kind == 'yolact':
        told = [InstanceData(coeffs=numbers[0, [3, 40]]), InstanceData(coeffs=numbers[1, [7]])]
        masks, _ = detector.mask_head(features, told)
        expected = torch.cat([mask.permute(2, 0, 1) for mask in masks])
        torch.testing.assert_close(drawn.sigmoid(), expected)
        return
    told = [
        InstanceData(param_preds=numbers[image, rows], points=places[rows, :2], strides=places[rows, 2])
        for image, rows in enumerate(([3, 40], [7]))
    ]
    torch.testing.assert_close(drawn, torch.cat(detector.mask_head(features, told)[0]))


@pytest.mark.parametrize('kind', ['mask_rcnn', 'solo', 'mask2former', 'cascade_mask_rcnn', 'htc', 'yolact', 'condinst'])
def test_the_global_loss_trains_masks(kind, monkeypatch):
    detector, data = detector_of(kind, monkeypatch)
    loss = FilteredGlobalLoss(GlobalLossConfig(score_thr=0.0, iou_thr=0.0))
    with torch.no_grad():
        teacher = predict_aligned(detector, data['inputs'], data['data_samples']).detach()
        same = predict_aligned(detector, data['inputs'], data['data_samples'], teacher)
        assert loss(same, teacher)['loss_mask'].abs() < 1e-6
        for parameter in detector.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    student = predict_aligned(detector, data['inputs'], data['data_samples'], teacher)
    terms = loss(student, teacher)
    assert terms['loss_mask'] > 0 and 'loss_raw' not in terms
    terms['loss_mask'].backward()
    trained = {name for name, p in detector.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    heads = dict(
        solo='mask_head.conv_mask', mask2former='panoptic_head.mask_embed', yolact='mask_head', condinst='mask_head'
    )
    head = heads.get(kind, 'roi_head.mask_head')
    assert any(name.startswith(head) for name in trained)
    weighed = predict_aligned(detector, data['inputs'], data['data_samples'])
    detector.zero_grad()
    noisy_loss(weighed).backward()
    reached = [p.grad is not None for name, p in detector.named_parameters() if name.startswith(head)]
    # where there are boxes, these weigh
    assert all(reached) if kind in ('solo', 'mask2former') else not any(reached)


def predictions(masks, scores, rows=None):
    """One image whose masks are given, (P, H, W), and so are the probabilities of its one class."""
    logits = torch.tensor(scores).logit()[None, :, None]
    return AlignedPredictions(cls_logits=logits, masks=Masks(lambda asked: masks[asked[:, 1]], rows))


def test_the_mask_term_is_the_mean_divergence_of_the_pixels_of_confident_priors():
    torch.manual_seed(0)
    before, after = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    scores = [0.9, 0.1, 0.6, 0.3]
    loss = FilteredGlobalLoss(GlobalLossConfig(score_thr=0.25, mask_weight=3.0))
    term = loss(predictions(after, scores), predictions(before, scores))['loss_mask']
    p, q = before.sigmoid(), after.sigmoid()
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean((1, 2))
    torch.testing.assert_close(term, 3 * divergence[[0, 2, 3]].mean())
    few = torch.tensor([[0, 1], [0, 3]])
    term = loss(predictions(after, scores, few), predictions(before, scores, few))['loss_mask']
    torch.testing.assert_close(term, 3 * divergence[3])


def test_without_a_confident_prior_the_term_is_zero_and_trains_nothing():
    masks = torch.randn(2, 3, 3, requires_grad=True)
    loss = FilteredGlobalLoss(GlobalLossConfig(score_thr=0.5))
    student = predictions(masks, [0.1, 0.2])
    student.cls_logits.requires_grad_()
    term = loss(student, predictions(masks, [0.1, 0.2]).detach())['loss_mask']
    term.backward()
    assert term == 0 and masks.grad is None


def test_a_negative_weight_of_masks_is_named():
    with pytest.raises(PTQError, match='mask_weight'):
        GlobalLossConfig(mask_weight=-1.0).check('ptq.global_loss')


def test_a_head_that_draws_otherwise_goes_to_the_fallback():
    class Own(dense_heads.SOLOHead):
        def predict_by_feat(self, *args, **kwargs):
            raise NotImplementedError

    head, outputs = head_and_outputs('solo')
    head.__class__ = Own
    assert align_head(head, outputs, metas()).raw is not None
