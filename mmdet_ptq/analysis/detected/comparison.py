"""The detections of two detectors on all evaluation images: what differs by class, by score and by image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mmdet_ptq.analysis.detected.average_precision import Matches, Truth, match_classes, mean_precision
from mmdet_ptq.analysis.detected.detections import SCORE_THR, Detections, match

# images are left out in so many groups, one after the other; fewer images than groups say nothing of a spread
GROUPS = 20


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
    evaluated = [match_classes(detections, truths, len(classes)) for detections in (before, after)]
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


def _interval(evaluated: Sequence[Sequence[Matches]], images: int) -> tuple[float, float] | None:
    """95 % interval of the difference in AP by the jackknife over groups of images, in points."""
    if images < 2 * GROUPS:
        return None
    groups = np.arange(images) % GROUPS
    whole, *without = (
        100 * (mean_precision(evaluated[1], counted) - mean_precision(evaluated[0], counted))
        for counted in (None, *(groups != group for group in range(GROUPS)))
    )
    spread = math.sqrt((GROUPS - 1) / GROUPS * np.square(np.subtract(without, np.mean(without))).sum())
    # 2.09: quantile of Student's distribution for 20 groups
    return (whole - 2.09 * spread, whole + 2.09 * spread) if math.isfinite(spread) else None
