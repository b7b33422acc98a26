"""Non-maximum suppression in operations of constant shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdet_ptq.deploy.onnx.nodes import OPSET

# mmdet keeps every detection of heads that do not limit them (YOLOX); a tensor has to end somewhere
MAX_DETECTIONS = 300
_NMS_KEYS = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
_symbolic = torch.onnx.ops.symbolic


@dataclass
class Candidates:
    """What non-maximum suppression reads.

    Attributes:
        boxes: (N, B, 4), x1, y1, x2, y2 in pixels of the input.
        scores: (N, B); zero where the score threshold or the smallest size rejected the candidate.
        labels: (N, B), int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Suppression:
    """Non-maximum suppression as mmcv's ``batched_nms``: classes are moved apart and suppressed together.

    Args:
        test_cfg: The head's ``test_cfg``.
    """

    def __init__(self, test_cfg: dict) -> None:
        self.count = test_cfg.get('max_per_img', MAX_DETECTIONS)
        self.agnostic = test_cfg['nms'].get('class_agnostic', False)
        self.limits = torch.tensor([self.count]), torch.tensor([float(test_cfg['nms']['iou_threshold'])])
        # scores that the threshold rejected are zero by now
        self.lowest = torch.tensor([0.0])
        self.columns = torch.tensor([0, 2])

    def __call__(self, found: Candidates) -> tuple[Tensor, Tensor, Tensor]:
        kept = self._kept(self._apart(found), found.scores)
        available = min(self.count, kept.shape[1])
        scores, index = kept.topk(available)
        real = scores > 0
        boxes = torch.where(real[..., None], found.boxes.gather(1, index[..., None].expand(-1, -1, 4)), 0.0)
        labels = torch.where(real, found.labels.gather(1, index), -1)
        missing = self.count - available
        if missing:
            boxes = nn.functional.pad(boxes, (0, 0, 0, missing))
            scores, labels = (nn.functional.pad(x, (0, missing), value=v) for x, v in ((scores, 0.0), (labels, -1)))
        return boxes, scores, labels

    def _apart(self, found: Candidates) -> Tensor:
        if self.agnostic:
            return found.boxes
        rejected = found.scores[..., None] <= 0
        largest = torch.where(rejected, 0.0, found.boxes).amax((1, 2), keepdim=True)
        return found.boxes + found.labels[..., None].to(found.boxes.dtype) * (largest + 1)

    def _kept(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """Scores of the boxes that remain, zeros elsewhere, (N, B): no shape depends on the image."""
        inputs = (boxes, scores[:, None], *self.limits, self.lowest)
        # how many rows come is known to the runtime only; the number told here stands for them while tracing
        rows = self.count
        selected = _symbolic('NonMaxSuppression', inputs, dtype=torch.int64, shape=(rows, 3), version=OPSET)
        places = _symbolic(
            'Gather', (selected, self.columns), attrs=dict(axis=1), dtype=torch.int64, shape=(rows, 2), version=OPSET
        )
        values = _symbolic('GatherND', (scores, places), dtype=torch.float32, shape=(rows,), version=OPSET)
        return _symbolic(
            'ScatterND',
            (torch.zeros_like(scores), places, values),
            dtype=torch.float32,
            shape=scores.shape,
            version=OPSET,
        )


def nms_trouble(name: str, settings: str, cfg: Mapping | None, needed: tuple[str, ...]) -> str:
    """Why the graph cannot suppress as a head is told to; '' if it can.

    Args:
        name: The head's class.
        settings: Key of its settings, for the sentence.
        cfg: The settings.
        needed: What they need besides `nms`.
    """
    if not cfg or any(key not in cfg for key in needed) or not cfg.get('nms'):
        wanted = ' and '.join(f'`{key}`' for key in (*needed, 'nms'))
        return f'`{settings}` of {name} needs {wanted}, and is {cfg}'
    count = cfg.get('max_per_img', 1)
    if type(count) is not int or count < 1:
        return f'`{settings}.max_per_img` of {name} must be a number of detections, and is {count!r}'
    nms = cfg['nms']
    if nms.get('type', 'nms') != 'nms' or set(nms) - _NMS_KEYS or 'iou_threshold' not in nms:
        return f"{name} has `{settings}.nms={dict(nms)}`; known is dict(type='nms', iou_threshold=...)"
    return ''
