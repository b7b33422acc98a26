"""A detector with one stage whose exported graph also decodes and suppresses, as mmdet's ``predict_by_feat`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.models.detectors import SingleStageDetector
from torch import Tensor, nn

from mmdet_ptq.deploy.onnx.end2end.decoding import Decoding, decoding_of
from mmdet_ptq.deploy.onnx.end2end.suppression import Suppression, nms_trouble


class OneStage(nn.Module):
    """Image in, detections out; only to be exported, its NMS has no values in PyTorch.

    Args:
        detector: The detector, float or quantized, in eval mode.
        outputs: Its raw outputs for an image tensor, whose maps tell the grids of the priors.
    """

    names, regions = ('boxes', 'scores', 'labels'), 0

    def __init__(self, detector: nn.Module, outputs: Sequence[Any]) -> None:
        super().__init__()
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


def one_stage_trouble(detector: nn.Module) -> str:
    """Why the decoding or the suppression of a detector has no place in its graph; '' if it has."""
    if type(detector).predict is not SingleStageDetector.predict:
        return f'{type(detector).__name__} predicts in a way of its own'
    head = detector.bbox_head
    name = type(head).__name__
    if decoding_of(head) is None:
        coder = type(getattr(head, 'bbox_coder', None)).__name__
        return (
            f'{name} decodes in a way of its own (box coder {coder}); known are the SSD, RetinaNet, ATSS, FCOS, '
            'RTMDet, GFL and YOLOX heads'
        )
    return nms_trouble(name, 'model.test_cfg', head.test_cfg, ('score_thr',))
