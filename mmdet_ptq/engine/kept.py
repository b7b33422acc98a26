"""What detectors found on the evaluation images, kept for the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import print_log
from torch.utils.data import Dataset

from mmdet_ptq.analysis.detected.average_precision import MAX_DETECTIONS, Truth
from mmdet_ptq.analysis.detected.detections import Detections
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import load_tensors, save_tensors

FOLDER = 'detections'


class _Keeper(BaseMetric):
    """A metric without figures, which keeps what the others see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            found = sample.get('pred_instances', {})
            if 'bboxes' not in found or 'scores' not in found or 'img_id' not in sample:
                self.results.append(None)
                continue
            best = found['scores'].topk(min(MAX_DETECTIONS, len(found['scores']))).indices
            boxes = get_box_tensor(found['bboxes'])[best, :4].float().cpu()
            scores, labels = found['scores'][best].float().cpu(), found['labels'][best].cpu()
            self.results.append((sample['img_id'], boxes, scores, labels))

    def compute_metrics(self, results: list) -> dict:
        if all(results):
            ids, boxes, scores, labels = zip(*results, strict=True)
            counts = torch.tensor([len(each) for each in scores])
            stored = dict(ids=list(ids), counts=counts, boxes=torch.cat(boxes), scores=torch.cat(scores))
            save_tensors(self.path, {**stored, 'labels': torch.cat(labels)})
        return {}


@contextmanager
def keeping(evaluator: Evaluator, work_dir: str | Path, row: str) -> Iterator[None]:
    """Keeps the detections that an evaluator sees, as ``detections/ROW.pth``.

    Args:
        evaluator: The evaluator; one of several data sets keeps nothing.
        work_dir: The work directory.
        row: Name of the detector's row.
    """
    if type(evaluator) is not Evaluator:
        yield
        return
    path = Path(work_dir) / FOLDER / f'{row}.pth'
    if is_main_process():
        path.unlink(missing_ok=True)
    keeper, metrics = _Keeper(path), evaluator.metrics
    evaluator.metrics = [*metrics, keeper]
    try:
        yield
    finally:
        evaluator.metrics = metrics


def kept_detections(work_dir: str | Path, row: str) -> dict[Any, Detections] | None:
    """Image id to what the detector of a row found, best first; None where it was not kept."""
    path = Path(work_dir) / FOLDER / f'{row}.pth'
    if not path.is_file():
        return None
    try:
        stored = load_tensors(path)
    except PTQError as error:
        print_log(f'what the {row} detector found cannot be read ({error}): the report leaves it out', 'current')
        return None
    parts = [stored[key].split(stored['counts'].tolist()) for key in ('boxes', 'scores', 'labels')]
    return {
        image: Detections(*(part.numpy() for part in found))
        for image, *found in zip(stored['ids'], *parts, strict=True)
    }


def truths_of(dataset: Dataset) -> dict[Any, Truth]:
    """Image id to its annotations, as the data set tells them; nothing where it does not."""
    if not hasattr(dataset, 'get_data_info'):
        return {}
    found = {}
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        if 'instances' not in info:
            return {}
        boxes = np.array([entry['bbox'] for entry in info['instances']], np.float32).reshape(-1, 4)
        labels = np.array([entry['bbox_label'] for entry in info['instances']], int)
        crowd = np.array([bool(entry.get('ignore_flag')) for entry in info['instances']], bool)
        found[info['img_id']] = Truth(boxes, labels, crowd)
    return found
