"""COCO's average precision of detections that are matched once, for images that count more than once or not at all."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_ptq.analysis.detected.detections import Detections

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
class Matches:
    """The detections of one class on all images, best first, as COCO's evaluation matched them.

    Attributes:
        matched: (10, D) whether an object was found, for each IoU from 0.5 to 0.95.
        ignored: (10, D) whether the detection counts at all.
        images: (D,) place of the image.
        truths: (N,) objects in each image.
    """

    matched: np.ndarray
    ignored: np.ndarray
    images: np.ndarray
    truths: np.ndarray

    @property
    def objects(self) -> int:
        """Objects of the class, on all images."""
        return int(self.truths.sum())

    def precision(self, counts: np.ndarray | None = None) -> float:
        """COCO's average precision; NaN where there are no objects.

        Args:
            counts: (N,) how often each image counts. Defaults to None: once.
        """
        counts = np.ones(len(self.truths), int) if counts is None else counts.astype(int)
        objects = int((self.truths * counts).sum())
        if not objects:
            return math.nan
        weights = counts[self.images]
        right = np.cumsum((self.matched & ~self.ignored) * weights, 1)
        wrong = np.cumsum((~self.matched & ~self.ignored) * weights, 1)
        precision = right / np.maximum(right + wrong, 1)
        # from here on it may only fall
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        total = 0.0
        for recalls, values in zip(right / objects, precision, strict=True):
            places = np.searchsorted(recalls, _RECALLS)
            total += np.append(values, 0.0)[places].mean()
        return total / len(precision)


def match_classes(detections: Mapping[Any, Detections], truths: Mapping[Any, Truth], classes: int) -> list[Matches]:
    """Matches detections with annotations as COCO's evaluation does.

    Args:
        detections: Image id to detections, in pixels of the image file.
        truths: The same of the annotations; an image is at the place that it has here.
        classes: Number of classes.

    Returns:
        An entry for each class.
    """
    numbers = {image: place for place, image in enumerate(truths)}
    annotations, results = [], []
    for image, truth in truths.items():
        for box, label, crowd in zip(truth.boxes, truth.labels, truth.crowd, strict=True):
            annotations.append(_annotation(numbers[image], box, label, iscrowd=int(crowd), id=len(annotations) + 1))
        if image in detections:
            found = detections[image]
            for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True):
                results.append(_annotation(numbers[image], box, label, iscrowd=0, id=len(results) + 1, score=score))
    images = len(truths)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation = COCOeval(*(_coco(entries, images, classes) for entries in (annotations, results)), 'bbox')
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ['all']
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
    return [_entries(evaluation.evalImgs[label * images : (label + 1) * images]) for label in range(classes)]


def mean_precision(classes: Sequence[Matches], counts: np.ndarray | None = None) -> float:
    """The mean over the classes that have objects; NaN where none has.

    Args:
        classes: What :func:`match_classes` returned.
        counts: How often each image counts. Defaults to None: once.
    """
    values = [value for value in (entries.precision(counts) for entries in classes) if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan


def paired_bootstrap(
    before: Sequence[Sequence[Matches]], after: Sequence[Sequence[Matches]], resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """The difference in AP of two detectors on the same images, with its 95 % interval.

    Images are drawn anew, the same ones for both, and AP is computed again each time. With several runs a side, the
    pairs of runs are drawn anew, too: the interval then holds what another seed changes.

    Args:
        before: What :func:`match_classes` returned for each run of one detector.
        after: The same for the other, run by run.
        resamples: How often images are drawn. Defaults to 1000.
        seed: Of the draws. Defaults to 0.

    Returns:
        The mean difference over the runs, the interval's ends, in points.
    """
    pairs, draw = list(zip(before, after, strict=True)), np.random.default_rng(seed)
    images = len(before[0][0].truths)

    def difference(counts: np.ndarray | None, chosen: Sequence[int]) -> float:
        found = {
            index: mean_precision(pairs[index][1], counts) - mean_precision(pairs[index][0], counts)
            for index in set(chosen)
        }
        return 100 * float(np.mean([found[index] for index in chosen]))

    drawn = [
        difference(
            draw.multinomial(images, np.full(images, 1 / images)), draw.integers(len(pairs), size=len(pairs)).tolist()
        )
        for _ in range(resamples)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return difference(None, range(len(pairs))), float(low), float(high)


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


def _entries(images: Sequence[Mapping | None]) -> Matches:
    matched, ignored, places, scores, truths = (
        [np.zeros((10, 0))],
        [np.zeros((10, 0))],
        [],
        [],
        np.zeros(len(images), int),
    )
    for number, image in enumerate(images):
        if image is None:
            continue
        matched.append(image['dtMatches'])
        ignored.append(image['dtIgnore'])
        scores += image['dtScores']
        places += [number] * len(image['dtScores'])
        truths[number] = int((np.asarray(image['gtIgnore']) == 0).sum())
    order = np.argsort(-np.asarray(scores), kind='stable')
    return Matches(
        np.concatenate(matched, 1)[:, order] != 0,
        np.concatenate(ignored, 1)[:, order] != 0,
        np.asarray(places, int)[order],
        truths,
    )
