"""Final detections of the float and the quantized detector on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmdet.structures.bbox import get_box_tensor
from torch import nn

from mmdet_ptq.calibration.global_loss import box_iou
from mmdet_ptq.wrapping import quantization_mode

# an object of at least this score counts as found; of two detections of one class that overlap so, both found it
SCORE_THR, MATCH_IOU = 0.3, 0.5


@dataclass
class Detections:
    """Detections of one image, best first.

    Attributes:
        boxes: (K, 4) ``x1, y1, x2, y2`` in pixels of the image that is shown.
        scores: (K,).
        labels: (K,) class indices.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score_thr: float) -> Detections:
        """Those with at least this score."""
        keep = self.scores >= score_thr
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])

    def scaled(self, factors: Sequence[float]) -> Detections:
        """The same on an image that was resized by these factors of x and y."""
        x, y = factors[:2]
        return Detections(self.boxes * np.array([x, y, x, y], dtype=self.boxes.dtype), self.scores, self.labels)


@dataclass
class DetectionPair:
    """One image with what both detectors see in it.

    Attributes:
        image: (H, W, 3) uint8, red first, as the network sees it before normalization.
        before: The float detector's detections.
        after: The quantized detector's detections.
    """

    image: np.ndarray
    before: Detections
    after: Detections


def match(before: Detections, after: Detections) -> list[tuple[int, int, float]]:
    """Pairs detections of the same class that overlap by half, best score first, as COCO's evaluation does.

    Args:
        before: The float detector's detections.
        after: The quantized detector's detections.

    Returns:
        (index in ``before``, index in ``after``, IoU) of each pair.
    """
    overlap = box_iou(torch.from_numpy(before.boxes)[:, None], torch.from_numpy(after.boxes)).numpy()
    overlap[before.labels[:, None] != after.labels] = 0
    pairs = []
    for i in np.argsort(-before.scores, kind='stable'):
        if len(after) and overlap[i].max() >= MATCH_IOU:
            j = int(overlap[i].argmax())
            pairs.append((int(i), j, float(overlap[i, j])))
            overlap[:, j] = 0
    return pairs


@torch.no_grad()
def detect_both(
    float_detector: nn.Module, detector: nn.Module, batches: Sequence[dict[str, Any]], num_images: int
) -> Iterator[DetectionPair]:
    """Runs both detectors on the first images.

    Args:
        float_detector: The float detector, or a wrapped one that is run in float mode.
        detector: The quantized detector.
        batches: Batches as a dataloader yields them, with the images not yet normalized.
        num_images: How many images.
    """
    left = num_images
    for batch in batches:
        if left <= 0:
            return
        batch = {key: value[:left] for key, value in batch.items()}
        left -= len(batch['inputs'])
        found = []
        for model, mode in ((float_detector, 'float'), (detector, 'quantize')):
            data = model.data_preprocessor(batch, False)
            with quantization_mode(model, mode):
                found.append([_detections(sample) for sample in model(**data, mode='predict')])
        for inputs, sample, before, after in zip(batch['inputs'], batch['data_samples'], *found, strict=True):
            yield DetectionPair(shown_image(inputs, sample.metainfo), before, after)


def shown_image(inputs: torch.Tensor, meta: dict[str, Any]) -> np.ndarray:
    """A pipeline's image (C, H, W), blue first or gray, as (H, W, 3), red first, without its padding."""
    inputs = inputs[:3] if len(inputs) >= 3 else inputs[:1].expand(3, -1, -1)
    if 'ori_shape' in meta and 'scale_factor' in meta:
        (height, width), (x, y) = meta['ori_shape'][:2], meta['scale_factor'][:2]
        inputs = inputs[:, : round(height * y), : round(width * x)]
    inputs = inputs.float()
    if inputs.max() > 255:  # more than 8 bits, of which a page shows none: as bright as its brightest pixel
        inputs = inputs * (255 / inputs.max())
    return np.ascontiguousarray(inputs.flip(0).permute(1, 2, 0).clamp(0, 255).byte().cpu().numpy())


def _detections(sample) -> Detections:
    instances = sample.pred_instances
    # the detector answers in pixels of the original image, the picture shows the network's input
    boxes = get_box_tensor(instances.bboxes).float().cpu().numpy()[:, :4]
    order = np.argsort(-instances.scores.cpu().numpy(), kind='stable')
    found = Detections(boxes[order], instances.scores.cpu().numpy()[order], instances.labels.cpu().numpy()[order])
    return found.scaled(sample.metainfo.get('scale_factor', (1.0, 1.0)))
