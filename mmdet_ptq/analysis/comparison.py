"""The detections of two detectors on all evaluation images: what differs by class, by score and by image."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_ptq.analysis.detections import SCORE_THR, Detections, match

# images are left out in so many groups, one after the other; fewer images than groups say nothing of a spread
GROUPS = 20
MAX_DETECTIONS = 100
_RECALLS = np.linspace(0, 1, 101)


@dataclass
class Truth:
    """What the annotations say of one image.

    Attributes:
        boxes: (G, 4) ``x1, y1, x2, y2`` in pixels of the image file.
        labels: (G,) class indices.
        crowd: (G,) whether it is a region that may be found or not.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


@dataclass
class ClassChange:
    """One class.

    Attributes:
        name: Its name.
        objects: How many objects the annotations have.
        before: AP of the float detector; None without objects.
        after: AP of the quantized one.
    """

    name: str
    objects: int
    before: float | None
    after: float | None


@dataclass
class ImageChange:
    """One image, at the score threshold.

    Attributes:
        image: Its id.
        kept: Objects that both find.
        lost: Objects that float alone finds.
        invented: Objects that the quantized detector alone finds.
        file: Name of its file, where it is known.
    """

    image: Any
    kept: int
    lost: int
    invented: int
    file: str = ''


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        model: Row of the quantized detector.
        images: How many.
        interval: 95 % interval of the difference in AP, in points; None where the images are too few for one.
        classes: Those that lost most first.
        score_thr: Score from which on an object counts as found.
        found: How many objects float and quantized find.
        same_count_thr: Score from which on the quantized detector finds as many as float; None where it never does.
        changed: Images with a lost or an invented object, the worst first.
    """

    model: str
    images: int
    interval: tuple[float, float] | None = None
    classes: list[ClassChange] = field(default_factory=list)
    score_thr: float = SCORE_THR
    found: tuple[int, int] = (0, 0)
    same_count_thr: float | None = None
    changed: list[ImageChange] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain dicts and lists, for ``results.json``."""
        return asdict(self)


def compare(
    model: str,
    before: Mapping[Any, Detections],
    after: Mapping[Any, Detections],
    truths: Mapping[Any, Truth],
    classes: Sequence[str],
) -> Comparison:
    """Compares two detectors on the same images.

    Args:
        model: Row of the quantized detector.
        before: Image id to the float detector's detections, in pixels of the image file.
        after: The same of the quantized detector.
        truths: The same of the annotations.
        classes: Names of the labels.
    """
    found = Comparison(model, len(before))
    evaluated = [_by_class(detections, truths, len(classes)) for detections in (before, after)]
    figures = [[entries.precision() for entries in side] for side in evaluated]
    found.classes = [
        ClassChange(name, entries.objects, *(None if math.isnan(value) else value for value in values))
        for name, entries, *values in zip(classes, evaluated[0], *figures, strict=True)
    ]
    found.classes.sort(key=lambda change: (change.before is None, (change.after or 0) - (change.before or 0)))
    found.interval = _interval(evaluated, len(truths))
    scores = [np.concatenate([d.scores for d in side.values()] or [np.zeros(0)]) for side in (before, after)]
    found.found = tuple(int((side >= SCORE_THR).sum()) for side in scores)
    if 0 < found.found[0] <= len(scores[1]):
        found.same_count_thr = float(np.sort(scores[1])[-found.found[0]])
    changes = [_image_change(image, before[image], after[image]) for image in before if image in after]
    found.changed = [change for change in changes if change.lost or change.invented]
    found.changed.sort(key=lambda change: -(change.lost + change.invented))
    return found


def _image_change(image: Any, before: Detections, after: Detections) -> ImageChange:
    before, after = before.above(SCORE_THR), after.above(SCORE_THR)
    kept = len(match(before, after)) if len(before) and len(after) else 0
    return ImageChange(image, kept, len(before) - kept, len(after) - kept)


@dataclass
class _Entries:
    """The detections of one class on all images, best first, as COCO's evaluation matched them.

    Attributes:
        matched: (10, D) whether an object was found, for each IoU from 0.5 to 0.95.
        ignored: (10, D) whether the detection counts at all.
        groups: (D,) group of the image.
        truths: (GROUPS,) objects in each group.
    """

    matched: np.ndarray
    ignored: np.ndarray
    groups: np.ndarray
    truths: np.ndarray

    @property
    def objects(self) -> int:
        return int(self.truths.sum())

    def precision(self, without: int | None = None) -> float:
        """COCO's average precision; NaN where there are no objects.

        Args:
            without: Group of images that is left out. Defaults to None.
        """
        kept = np.ones(len(self.groups), bool) if without is None else self.groups != without
        objects = self.truths.sum() - (0 if without is None else self.truths[without])
        if not objects:
            return math.nan
        right = np.cumsum(self.matched[:, kept] & ~self.ignored[:, kept], 1)
        wrong = np.cumsum(~self.matched[:, kept] & ~self.ignored[:, kept], 1)
        precision = right / np.maximum(right + wrong, 1)
        # from here on it may only fall
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        total = 0.0
        for recalls, values in zip(right / objects, precision, strict=True):
            places = np.searchsorted(recalls, _RECALLS)
            total += np.append(values, 0.0)[places].mean()
        return total / len(precision)


def _by_class(detections: Mapping[Any, Detections], truths: Mapping[Any, Truth], count: int) -> list[_Entries]:
    numbers = {image: place for place, image in enumerate(truths)}
    annotations, results = [], []
    for image, truth in truths.items():
        for box, label, crowd in zip(truth.boxes, truth.labels, truth.crowd, strict=True):
            annotations.append(_annotation(numbers[image], box, label, iscrowd=int(crowd), id=len(annotations) + 1))
        if image in detections:
            found = detections[image]
            for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True):
                results.append(_annotation(numbers[image], box, label, iscrowd=0, id=len(results) + 1, score=score))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation = COCOeval(*(_coco(entries, len(truths), count) for entries in (annotations, results)), 'bbox')
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ['all']
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
    images = len(truths)
    return [_entries(evaluation.evalImgs[label * images : (label + 1) * images]) for label in range(count)]


def _annotation(image: int, box: np.ndarray, label: int, **others: Any) -> dict:
    x1, y1, x2, y2 = map(float, box)
    width, height = x2 - x1, y2 - y1
    return dict(
        image_id=image, category_id=int(label), bbox=[x1, y1, width, height], area=width * height, ignore=0, **others
    )


def _coco(annotations: list[dict], images: int, classes: int) -> COCO:
    made = COCO()
    made.dataset = dict(
        images=[dict(id=number) for number in range(images)],
        categories=[dict(id=label, name=str(label)) for label in range(classes)],
        annotations=annotations,
    )
    made.createIndex()
    return made


def _entries(images: Sequence[Mapping | None]) -> _Entries:
    matched, ignored, groups, scores, truths = [np.zeros((10, 0))], [np.zeros((10, 0))], [], [], np.zeros(GROUPS, int)
    for number, image in enumerate(images):
        if image is None:
            continue
        matched.append(image['dtMatches'])
        ignored.append(image['dtIgnore'])
        scores += image['dtScores']
        groups += [number % GROUPS] * len(image['dtScores'])
        truths[number % GROUPS] += int((np.asarray(image['gtIgnore']) == 0).sum())
    order = np.argsort(-np.asarray(scores), kind='stable')
    return _Entries(
        np.concatenate(matched, 1)[:, order] != 0,
        np.concatenate(ignored, 1)[:, order] != 0,
        np.asarray(groups, int)[order],
        truths,
    )


def _interval(evaluated: Sequence[Sequence[_Entries]], images: int) -> tuple[float, float] | None:
    """95 % interval of the difference in AP by the jackknife over groups of images, in points."""
    if images < 2 * GROUPS:
        return None
    whole, *without = (
        100 * (_mean(evaluated[1], left_out) - _mean(evaluated[0], left_out)) for left_out in (None, *range(GROUPS))
    )
    spread = math.sqrt((GROUPS - 1) / GROUPS * np.square(np.subtract(without, np.mean(without))).sum())
    # 2.09: quantile of Student's distribution for 20 groups
    return (whole - 2.09 * spread, whole + 2.09 * spread) if math.isfinite(spread) else None


def _mean(classes: Sequence[_Entries], without: int | None) -> float:
    values = [value for value in (entries.precision(without) for entries in classes) if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan
