"""A detector whose exported graph also decodes and suppresses, as mmdet's ``predict_by_feat`` does, in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.detectors import SingleStageDetector
from torch import Tensor, nn

from mmdet_ptq.deploy.onnx.decoding import Candidates, Decoding, decoding_of
from mmdet_ptq.deploy.onnx.nodes import OPSET
from mmdet_ptq.errors import PTQError

INPUTS, OUTPUTS = ['input', 'size'], ['boxes', 'scores', 'labels']
# mmdet keeps every detection of heads that do not limit them (YOLOX); a tensor has to end somewhere
MAX_DETECTIONS = 300
_NMS_KEYS = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
_symbolic = torch.onnx.ops.symbolic


class EndToEnd(nn.Module):
    """Image in, detections out; only to be exported, its NMS has no values in PyTorch.

    Args:
        detector: The detector, float or quantized, in eval mode.
        outputs: Its raw outputs for an image tensor, whose maps tell the grids of the priors.

    Raises:
        PTQError: See :func:`check_end2end`.
    """

    def __init__(self, detector: nn.Module, outputs: Sequence[Any]) -> None:
        super().__init__()
        check_end2end(detector)
        head = detector.bbox_head
        self.detector = detector
        self.decoding: Decoding = decoding_of(head)(head, [maps.shape[-2:] for maps in outputs[0]])
        self.suppression = Suppression(head.test_cfg)

    def forward(self, input: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detections, best first.

        Args:
            input: (N, C, H, W), normalized as mmdet's data preprocessor does.
            size: (N, 2), height and width of each image within its tensor: boxes end there, before they are
                suppressed, and not where the padding ends.

        Returns:
            Boxes (N, K, 4) as x1, y1, x2, y2 in pixels of the input, scores (N, K) and labels (N, K), int64; K is
            ``test_cfg.max_per_img``, places without a detection hold zeros and the label -1.
        """
        border = size[:, [1, 0, 1, 0]][:, None]
        return self.suppression(self.decoding(self.detector(input, None, mode='tensor'), border))


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


def check_end2end(detector: nn.Module) -> None:
    """Refuses detectors whose decoding or suppression the exported graph could not repeat.

    Args:
        detector: A detector that :func:`mmdet_ptq.deploy.network.raw_outputs.check_exportable` accepts.

    Raises:
        PTQError: Its head decodes in a way of its own, or its NMS is not the plain one; names the head.
    """
    if trouble := end2end_trouble(detector):
        raise PTQError(f'--end2end: {trouble}; export without --end2end.')


def end2end_trouble(detector: nn.Module) -> str:
    """Why the decoding or the suppression of a detector has no place in its graph; '' if it has."""
    if type(detector).predict is not SingleStageDetector.predict:
        return f'{type(detector).__name__} predicts in a way of its own'
    head, test_cfg = detector.bbox_head, detector.bbox_head.test_cfg
    name = type(head).__name__
    if decoding_of(head) is None:
        coder = type(getattr(head, 'bbox_coder', None)).__name__
        return (
            f'{name} decodes in a way of its own (box coder {coder}); known are the SSD, RetinaNet, ATSS, FCOS, '
            'RTMDet, GFL and YOLOX heads'
        )
    if not test_cfg or 'score_thr' not in test_cfg or not test_cfg.get('nms'):
        return f'`model.test_cfg` of {name} needs `score_thr` and `nms`, and is {test_cfg}'
    nms = test_cfg['nms']
    if nms.get('type', 'nms') != 'nms' or set(nms) - _NMS_KEYS or 'iou_threshold' not in nms:
        return f"{name} has `model.test_cfg.nms={dict(nms)}`; known is dict(type='nms', iou_threshold=...)"
    return ''
