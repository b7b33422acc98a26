"""Drawn annotations and what detectors find of them."""

import numpy as np

from mmdet_ptq.analysis.detected.average_precision import Truth
from mmdet_ptq.analysis.detected.detections import Detections

CLASSES = ('cat', 'dog', 'bird')


def scene(seed, images=60, objects=4):
    """Annotations, some of them crowds, of two classes of three; and what a detector finds that misses every tenth."""
    random = np.random.default_rng(seed)
    truths, found = {}, {}
    for image in range(images):
        corners = random.uniform(0, 80, (objects, 2))
        boxes = np.hstack([corners, corners + random.uniform(8, 40, (objects, 2))]).astype(np.float32)
        labels, crowd = random.integers(0, 2, objects), random.random(objects) < 0.1
        truths[f'i{image}'] = Truth(boxes, labels, crowd)
        kept = random.random(objects) > 0.1
        shifted = boxes[kept] + random.normal(0, 1.5, (int(kept.sum()), 4)).astype(np.float32)
        scores = np.sort(random.uniform(0.2, 1, int(kept.sum())).astype(np.float32))[::-1].copy()
        found[f'i{image}'] = Detections(shifted, scores, labels[kept])
    return truths, found


def worse(found, step=4):
    """Every so-and-so-many-th detection is gone, another one elsewhere, the scores are a tenth lower."""
    changed = {}
    for number, (image, side) in enumerate(found.items()):
        keep = np.ones(len(side), bool)
        boxes = side.boxes.copy()
        if number % step == 0:
            keep[:1] = False
            boxes[-1:] += 200
        changed[image] = Detections(boxes[keep], 0.9 * side.scores[keep], side.labels[keep])
    return changed
