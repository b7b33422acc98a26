"""The filtered global loss against a slow reference that follows the formula box by box."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS

from mmdet_ptq.calibration.global_loss import FilteredGlobalLoss, box_iou, generalized_box_iou
from mmdet_ptq.config import GlobalLossConfig, PTQConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import AlignedPredictions, align_head

TERMS = ('loss_cls', 'loss_box', 'loss_quality', 'loss_distribution')


def loss_of(**settings):
    return FilteredGlobalLoss(GlobalLossConfig(**{'max_boxes': None, **settings}))


def predictions(seed, activation='sigmoid', full=True, num_images=2, num_priors=12, noise=0.0):
    """Random predictions; ``noise`` moves them away from those of the same seed."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=gen)

    def build():
        corner = draw(num_images, num_priors, 2).abs() * 20
        size = draw(num_images, num_priors, 2).abs() * 10 + 0.2  # some sides are below one pixel
        return dict(
            cls_logits=draw(num_images, num_priors, 3 + (activation == 'softmax')) * 2 - 1,
            boxes=torch.cat([corner, corner + size], -1),
            quality_logits=draw(num_images, num_priors) if full else None,
            distributions=draw(num_images, num_priors, 4, 5) if full else None,
        )

    parts, moved = build(), build()
    parts = {k: v if v is None else (v + noise * (moved[k] - v)).requires_grad_(True) for k, v in parts.items()}
    return AlignedPredictions(**parts, activation=activation, level_sizes=(num_priors,))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def binary_kl(p, q):
    return kl([p, 1 - p], [q, 1 - q])


def slow_iou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union > 0 else 0.0


def slow_giou(a, b):
    w, h = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    iou = slow_iou(a, b)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    union = area / (1 + iou)
    return iou - (w * h - union) / (w * h)


def slow_box(box, target, kind):
    side = [max(1.0, target[2] - target[0]), max(1.0, target[3] - target[1])]
    if kind == 'giou':
        return 1 - slow_giou(box, target)
    return sum(abs((box[k] - target[k]) / side[k % 2]) for k in range(4)) / 4


def slow_loss(student, teacher, score_thr, iou_thr, combine, box_loss, weights):
    sums, kept, per_image = [0.0] * 4, 0, []
    for i in range(teacher.boxes.shape[0]):
        before = kept
        for j in range(teacher.boxes.shape[1]):
            s, t = student.cls_logits[i, j].tolist(), teacher.cls_logits[i, j].tolist()
            if teacher.activation == 'sigmoid':
                score = max(sigmoid(v) for v in t)
                cls = sum(binary_kl(sigmoid(b), sigmoid(a)) for a, b in zip(s, t, strict=True))
            else:
                score = max(softmax(t)[:-1])
                cls = kl(softmax(t), softmax(s))
            quality = distribution = 0.0
            if teacher.quality_logits is not None:
                a, b = sigmoid(student.quality_logits[i, j]), sigmoid(teacher.quality_logits[i, j])
                score *= b
                quality = binary_kl(b, a)
            if teacher.distributions is not None:
                a, b = student.distributions[i, j].tolist(), teacher.distributions[i, j].tolist()
                distribution = sum(kl(softmax(b[k]), softmax(a[k])) for k in range(4)) / 4
            box, target = student.boxes[i, j].tolist(), teacher.boxes[i, j].tolist()
            passes = [score >= score_thr, slow_iou(target, box) >= iou_thr]
            if all(passes) if combine == 'and' else any(passes):
                kept += 1
                for k, value in enumerate((cls, slow_box(box, target, box_loss), quality, distribution)):
                    sums[k] += weights[k] * value
        per_image.append(kept - before)
    return [total / max(kept, 1) for total in sums], per_image


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('combine', ['and', 'or'])
@pytest.mark.parametrize('box_loss', ['l1', 'giou'])
@pytest.mark.parametrize('full', [True, False])
def test_the_whole_loss_is_the_formula(activation, combine, box_loss, full):
    teacher = predictions(0, activation, full)
    student = predictions(0, activation, full, noise=0.2)
    weights = (0.7, 1.3, 0.9, 0.4)
    loss = loss_of(
        score_thr=0.3,
        iou_thr=0.45,
        box_weight=weights[1],
        cls_weight=weights[0],
        combine=combine,
        box_loss=box_loss,
        quality_weight=weights[2],
        distribution_weight=weights[3],
    )
    got = loss(student, teacher)
    expected, per_image = slow_loss(student, teacher, 0.3, 0.45, combine, box_loss, weights)
    assert 0 < sum(per_image) < 24, 'the case should keep some boxes and drop some'
    for name, value in zip(TERMS, expected, strict=True):
        if name in got:
            assert got[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert (set(got) >= set(TERMS)) is full
    assert got['kept'].item() == pytest.approx(sum(per_image) / 2)
    assert got['kept_share'].item() == pytest.approx(sum(per_image) / 24)
    assert got['images_without_boxes'].item() == per_image.count(0)


def test_each_filter_drops_what_it_should():
    logits = torch.tensor([[[3.0], [3.0], [-3.0], [-3.0]]])
    boxes = torch.tensor([[[0.0, 0, 10, 10]] * 4])
    moved = boxes + torch.tensor([0.0, 50.0, 0.0, 50.0]).view(1, 4, 1)
    teacher, student = AlignedPredictions(logits, boxes), AlignedPredictions(logits, moved)
    kept = {c: loss_of(score_thr=0.5, iou_thr=0.5, combine=c)(student, teacher)['kept'].item() for c in ('and', 'or')}
    assert kept == {'and': 1, 'or': 3}


def test_states_are_compared_on_the_same_boxes():
    teacher = predictions(0)
    moved = replace(teacher, boxes=teacher.boxes + 3)
    ruined = replace(teacher, boxes=teacher.boxes + 1e4)
    lost = replace(teacher, boxes=torch.full_like(teacher.boxes, math.nan))
    for combine in ('and', 'or'):
        loss = loss_of(score_thr=0.0, combine=combine)
        kept, near, far, gone = (
            loss.unfiltered()(x.with_finite_boxes(), teacher)['loss_box'] for x in (teacher, moved, ruined, lost)
        )
        assert kept == 0 < near < far < 1e6 and 0 < gone < 1e6
        assert (loss.cfg.iou_thr, loss.cfg.combine) == (0.1, combine)
    assert loss(ruined, teacher)['kept'] == 12 and loss_of()(ruined, teacher)['loss_box'] == 0


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('box_loss', ['l1', 'giou'])
def test_the_loss_is_zero_when_nothing_is_quantized(activation, box_loss):
    teacher = predictions(3, activation)
    got = loss_of(score_thr=0.0, iou_thr=0.0, box_loss=box_loss)(predictions(3, activation), teacher)
    assert got['kept_share'] == 1
    for name in TERMS:
        assert got[name].item() == pytest.approx(0, abs=1e-6), name


@pytest.mark.parametrize('full_mask', [True, False])
def test_empty_and_full_masks_stay_finite_and_differentiable(full_mask):
    teacher, student = predictions(1), predictions(2)
    thr = dict(score_thr=0.0, iou_thr=0.0) if full_mask else dict(score_thr=1.0, iou_thr=1.0)
    got = loss_of(**thr)(student, teacher)
    total = sum(got[name] for name in TERMS)
    total.backward()
    parts = (student.cls_logits, student.boxes, student.quality_logits, student.distributions)
    assert all(torch.isfinite(part.grad).all() for part in parts)
    if full_mask:
        assert got['kept_share'] == 1 and got['images_without_boxes'] == 0
        assert all(part.grad.abs().sum() > 0 for part in parts)
    else:
        assert total.item() == 0 and got['kept'] == 0 and got['images_without_boxes'] == 2
        assert all(part.grad.abs().sum() == 0 for part in parts)


def test_an_image_without_kept_boxes_adds_nothing():
    teacher, student = predictions(1), predictions(1, noise=0.1)
    with torch.no_grad():
        teacher.cls_logits[1] = -30
    loss = loss_of(score_thr=0.01)
    both = loss(student, teacher)
    first = [
        replace(a, **{k: v[:1] for k, v in vars(a).items() if isinstance(v, torch.Tensor)}) for a in (student, teacher)
    ]
    alone = loss(*first)
    assert both['images_without_boxes'] == 1 and alone['images_without_boxes'] == 0
    for name in TERMS:
        torch.testing.assert_close(both[name], alone[name])


def test_gradients_reach_kept_boxes_only():
    teacher, student = predictions(1), predictions(1, noise=0.15)
    loss = loss_of(score_thr=0.2, iou_thr=0.3)
    sum(loss(student, teacher)[name] for name in TERMS).backward()
    keep = (teacher.confidence() >= 0.2) & (box_iou(teacher.boxes, student.boxes) >= 0.3)
    assert keep.any() and not keep.all()
    for part in (student.cls_logits, student.boxes, student.quality_logits, student.distributions):
        touched = part.grad.flatten(2).abs().sum(-1) > 0 if part.dim() > 2 else part.grad.abs() > 0
        assert torch.equal(touched, keep)
    assert teacher.cls_logits.grad is None


def test_boxes_without_area_do_not_break_the_loss():
    boxes = torch.tensor([[[5.0, 5, 5, 5], [1, 1, 1, 9], [9, 9, 2, 2], [0, 0, 4, 4]]])
    for box_loss in ('l1', 'giou'):
        moved = (boxes + 0.5).requires_grad_(True)
        teacher = AlignedPredictions(torch.ones(1, 4, 2), boxes)
        got = loss_of(box_loss=box_loss, combine='or')(AlignedPredictions(torch.ones(1, 4, 2), moved), teacher)
        got['loss_box'].backward()
        assert got['kept'] == 4
        assert torch.isfinite(got['loss_box']) and torch.isfinite(moved.grad).all()
        same = loss_of(box_loss=box_loss, combine='or')(teacher, teacher)
        assert same['loss_box'].item() == pytest.approx(0, abs=1e-6)


COMMON = dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1)
ANCHORS = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16])
GN = dict(type='GN', num_groups=2)


@pytest.mark.parametrize(
    'config',
    [
        dict(COMMON, type='RetinaHead', anchor_generator=ANCHORS),
        dict(COMMON, type='FCOSHead', strides=[8, 16], norm_cfg=GN),
        dict(
            COMMON,
            type='GFLHead',
            reg_max=6,
            anchor_generator=ANCHORS,
            norm_cfg=GN,
            loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
        ),
        dict(COMMON, type='YOLOXHead', strides=(8, 16)),
    ],
    ids=lambda config: config['type'],
)
def test_gradients_reach_every_parameter_of_a_real_head(config):
    torch.manual_seed(0)
    head = MODELS.build(config).eval()
    feats = [torch.randn(2, 8, 64 // stride, 64 // stride) for stride in (8, 16)]
    with torch.no_grad():
        teacher = align_head(head, head(feats), [{}, {}])
    loss = loss_of()
    unchanged = loss(align_head(head, head(feats), [{}, {}]), teacher)
    assert unchanged['kept'] > 0
    assert sum(unchanged[name] for name in TERMS if name in unchanged).item() == pytest.approx(0, abs=1e-5)

    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    changed = loss(align_head(head, head(feats), [{}, {}]), teacher)
    sum(changed[name] for name in TERMS if name in changed).backward()
    for name, parameter in head.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


def test_max_boxes_takes_the_most_confident_of_each_image():
    teacher, student = predictions(1), predictions(1, noise=0.3)
    best = teacher.confidence().topk(4, dim=1).indices
    expected = loss_of(score_thr=0.0, iou_thr=0.0)(student.take(best), teacher.take(best))
    got = loss_of(score_thr=0.0, iou_thr=0.0, max_boxes=4)(student, teacher)
    for name in TERMS:
        torch.testing.assert_close(got[name], expected[name])
    assert got['kept'] == 4
    assert got['kept_share'].item() == pytest.approx(4 / 12)


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_ground_truth_as_target(activation):
    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [40, 40, 50, 50], [70, 70, 80, 80]]])
    width = 2 + (activation == 'softmax')
    logits = torch.full((1, 4, width), -1.0)
    logits[0, 3] = torch.tensor([-9.0, -9.0] + [9.0] * (width - 2))  # below the score threshold
    teacher = AlignedPredictions(logits, boxes, activation)
    student = AlignedPredictions(logits + 0.3, boxes + 1, activation)
    gt = [SimpleNamespace(bboxes=torch.tensor([[0.0, 0, 10, 12]]), labels=torch.tensor([1]))]
    got = loss_of(score_thr=0.1, target='ground_truth')(student, teacher, gt)

    # priors 0 and 1 overlap the object; 2 is background but confident; 3 is dropped
    assert got['kept'] == 3
    expected = 0
    for j, label in ((0, 1), (1, 1), (2, None)):
        values = student.cls_logits[0, j].tolist()
        if activation == 'softmax':
            expected -= math.log(softmax(values)[2 if label is None else label])
        else:
            expected -= sum(math.log(sigmoid(v) if k == label else 1 - sigmoid(v)) for k, v in enumerate(values))
    assert got['loss_cls'].item() == pytest.approx(expected / 3, rel=1e-5)
    target = gt[0].bboxes[0].tolist()
    expected = sum(slow_box(student.boxes[0, j].tolist(), target, 'l1') for j in (0, 1)) / 2
    assert got['loss_box'].item() == pytest.approx(expected, rel=1e-5)


def test_ground_truth_of_an_image_without_objects_is_background():
    teacher = predictions(1, full=False, num_images=1)
    gt = [SimpleNamespace(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]
    got = loss_of(score_thr=0.0, target='ground_truth')(teacher, teacher, gt)
    assert got['loss_box'] == 0 and got['kept'] == 12
    expected = torch.nn.functional.softplus(teacher.cls_logits).sum(-1).mean()
    torch.testing.assert_close(got['loss_cls'], expected)


def test_ground_truth_needs_annotations():
    teacher = predictions(1)
    with pytest.raises(PTQError, match="target='float'"):
        loss_of(target='ground_truth')(teacher, teacher)


def test_raw_outputs_are_compared_in_units_of_their_variance():
    teacher = [torch.randn(3, 4) * 10, torch.randn(5), torch.zeros(0)]
    student = [(t + k).requires_grad_(True) for k, t in enumerate(teacher)]
    got = loss_of()(AlignedPredictions(None, raw=student), AlignedPredictions(None, raw=teacher))
    expected = (0 + 1 / teacher[1].var(correction=0)) / 2
    assert set(got) == {'loss_raw'}
    torch.testing.assert_close(got['loss_raw'], expected)
    got['loss_raw'].backward()
    assert student[1].grad.abs().sum() > 0


def test_raw_outputs_that_do_not_pair_are_refused():
    with pytest.raises(PTQError, match='align_head.register'):
        loss_of()(AlignedPredictions(None, raw=[torch.ones(2)]), AlignedPredictions(None, raw=[torch.ones(3)]))


def test_predictions_that_do_not_pair_are_refused():
    with pytest.raises(PTQError, match='same images'):
        loss_of()(predictions(0), predictions(0, num_priors=7))


def test_both_stages_of_a_two_stage_detector_enter():
    teacher = replace(predictions(0, 'softmax', False), proposal_stage=predictions(1, full=False))
    student = replace(predictions(0, 'softmax', False, noise=0.1), proposal_stage=predictions(1, full=False, noise=0.1))
    loss = loss_of(score_thr=0.1, iou_thr=0.1)
    got = loss(student, teacher)
    first, second = (
        loss(student.proposal_stage, teacher.proposal_stage),
        loss(replace(student, proposal_stage=None), replace(teacher, proposal_stage=None)),
    )
    assert got['loss_rpn_box'] == first['loss_box'] and got['loss_rpn_cls'] == first['loss_cls']
    assert got['rpn_kept'] == first['kept']
    assert got['loss_box'] == second['loss_box'] and got['loss_cls'] == second['loss_cls']


def test_a_proposal_network_sees_annotated_objects_as_one_class():
    boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    one = AlignedPredictions(torch.zeros(1, 1, 1), boxes)
    gt = [SimpleNamespace(bboxes=boxes[0], labels=torch.tensor([2]))]
    got = loss_of(target='ground_truth')(one, one, gt)
    assert got['loss_cls'].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    'kwargs, words',
    [
        (dict(combine='adn'), "combine.*Did you mean 'and'"),
        (dict(box_loss='gio'), "box_loss.*Did you mean 'giou'"),
        (dict(target='floats'), "target.*Did you mean 'float'"),
        (dict(score_thr=2), 'score_thr'),
        (dict(iou_thr=float('nan')), 'iou_thr'),
        (dict(box_weight=-1), 'box_weight'),
        (dict(cls_weight='1'), 'cls_weight'),
        (dict(max_boxes=0), 'max_boxes'),
        (dict(max_boxes=2.5), 'max_boxes'),
    ],
)
def test_bad_arguments_are_told(kwargs, words):
    with pytest.raises(PTQError, match=words):
        PTQConfig.from_dict(dict(preset='w8a8', global_loss=kwargs))


def test_overlaps():
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 2, 2], [3, 3, 3, 3]])
    b = torch.tensor([[5.0, 0, 15, 10], [4, 0, 6, 2], [3, 3, 3, 3]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([1 / 3, 0.0, 0.0]))
    torch.testing.assert_close(generalized_box_iou(a, b)[:2], torch.tensor([1 / 3, -1 / 3]))
