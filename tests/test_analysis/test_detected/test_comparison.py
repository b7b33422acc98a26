"""What differs between two detectors' detections on all images."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import CLASSES, scene, worse

from mmdet_ptq.analysis import headlines
from mmdet_ptq.analysis.detected.comparison import compare
from mmdet_ptq.analysis.verdict import verdict


def coco_figures(truths, found):
    """AP by class by pycocotools alone."""
    places = {image: place for place, image in enumerate(truths)}

    def listed(sides, **more):
        for image, side in sides.items():
            for row, (box, label) in enumerate(zip(side.boxes, side.labels, strict=True)):
                x1, y1, x2, y2 = map(float, box)
                entry = dict(image_id=places[image], category_id=int(label), bbox=[x1, y1, x2 - x1, y2 - y1])
                yield entry | {key: of(side, row) for key, of in more.items()}

    truth = COCO()
    annotations = list(listed(truths, iscrowd=lambda side, row: int(side.crowd[row])))
    for number, entry in enumerate(annotations, 1):
        entry.update(id=number, area=entry['bbox'][2] * entry['bbox'][3])
    categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES)]
    truth.dataset = dict(images=[dict(id=p) for p in places.values()], annotations=annotations, categories=categories)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results = truth.loadRes(list(listed(found, score=lambda side, row: float(side.scores[row]))))
        evaluation = COCOeval(truth, results, 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval['precision'][:, :, :, 0, -1]
    return [None if (precision[..., k] == -1).all() else precision[..., k].mean() for k in range(len(CLASSES))]


@pytest.fixture(scope='module')
def compared():
    truths, before = scene(0)
    after = worse(before)
    return truths, before, after, compare('runtime', before, after, truths, CLASSES)


def test_the_figures_of_classes_are_cocos(compared):
    truths, before, after, found = compared
    classes = {change.name: change for change in found.classes}
    for name, *expected in zip(CLASSES, coco_figures(truths, before), coco_figures(truths, after), strict=True):
        change = classes[name]
        assert [change.before, change.after] == pytest.approx(expected) if expected[0] else change.before is None
        crowds = sum(int(((t.labels == CLASSES.index(name)) & ~t.crowd).sum()) for t in truths.values())
        assert change.objects == crowds
    losses = [change.after - change.before for change in found.classes[:2]]
    assert losses == sorted(losses) and losses[0] < 0 and found.classes[2].name == 'bird'


def test_the_interval_holds_the_difference_and_is_none_for_few_images(compared):
    truths, before, after, found = compared
    change = 100 * np.mean([c.after - c.before for c in found.classes[:2]])
    low, high = found.interval
    assert low < change < high < 0 and high - low < 20
    assert compare('same', before, before, truths, CLASSES).interval == (0, 0)
    few = list(truths)[:39]
    sides = ({image: side[image] for image in few} for side in (before, after, truths))
    assert compare('few', *sides, CLASSES).interval is None


def test_images_and_scores_that_changed_are_counted(compared):
    truths, before, after, found = compared
    assert found.images == 60
    worst = found.changed[0]
    sides = before[worst.image].above(0.3), after[worst.image].above(0.3)
    assert (worst.kept + worst.lost, worst.kept + worst.invented) == tuple(map(len, sides))
    assert worst.lost + worst.invented == max(c.lost + c.invented for c in found.changed) >= 2
    counts = [sum(len(side[image].above(thr)) for image in side) for side, thr in ((before, 0.3), (after, 0.3))]
    assert found.found == tuple(counts)
    assert sum(len(side.above(found.same_count_thr)) for side in after.values()) == counts[0]
    assert found.same_count_thr < 0.3
    unchanged = compare('same', before, before, truths, CLASSES)
    assert unchanged.changed == [] and unchanged.same_count_thr >= 0.3
    nothing = {image: side.above(2) for image, side in before.items()}
    assert compare('blind', before, nothing, truths, CLASSES).same_count_thr is None
    json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ('change', 'interval', 'ratio', 'remark', 'told'),
    [
        (-0.1, (-0.3, 0.1), 1.5, '', 'Ship onnxruntime: coco/bbox_mAP 0.412 -> 0.411 (-0.1 points, 95 % interval -0.3'),
        (-0.4, (-0.9, 0.1), 1.5, '', '; the images are too few to tell a loss that matters from none.'),
        (-2.0, (-2.4, -1.6), 1.5, '', 'Not yet, integers cost too much: coco/bbox_mAP 0.412 -> 0.392 (-2.0 points'),
        (0.0, (-0.2, 0.2), 0.8, '', 'Keep float here, unless size counts: onnxruntime is slower: coco'),
        (
            0.0,
            (-0.2, 0.2),
            1.5,
            'wrong',
            'Nothing to ship yet: the figures of its runtimes are wrong on this processor',
        ),
    ],
)
def test_the_verdict_is_of_the_runtime(results, tiny, change, interval, ratio, remark, told):
    row = results['rows'][2]
    row.update(metrics={'coco/bbox_mAP': 0.412 + change / 100}, latency_ratio=ratio, remark=remark)
    row['latency'] = dict(ms=2.0, float_ms=2 * ratio, threads=1, batch=1)
    results['comparison'] = dict(model='onnxruntime', interval=interval, images=100)
    assert told in verdict(results)
    tiles = {tile.label: tile for tile in headlines(results, tiny.structure)}
    if not remark:
        assert tiles['change'].kind == ('loss' if change < 0 else '')
        assert tiles['change'].detail == f'95 % interval {interval[0]:+.1f} to {interval[1]:+.1f}'
        assert tiles['speed'].detail.startswith(f'{2 * ratio:.1f} → 2.0 ms, 1 thread')


def test_the_verdict_without_a_runtime(results):
    results['rows'] = results['rows'][:2]
    assert verdict(results).startswith('Nothing to ship yet: no runtime has been evaluated; coco/bbox_mAP 0.412')
    results['rows'] = []
    assert 'no quantized model has been evaluated' in verdict(results)
