"""The model of the global stage: the quantized detector behind mmengine's training interface."""
from __future__ import annotations

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..calibration import FilteredGlobalLoss
from ..errors import PTQError
from ..predictions import AlignedPredictions, predict_aligned


class _TestPreprocessor(nn.Module):
    """The detector's data preprocessor without its training augmentations (random sizes, batch mixing)."""

    def __init__(self, preprocessor: nn.Module) -> None:
        super().__init__()
        self.preprocessor = preprocessor

    def forward(self, data: dict, training: bool = False) -> dict:
        return self.preprocessor(data, False)


class GlobalLossModel(BaseModel):
    """Loss of the quantized detector against the float one, for mmengine's loops.

    Args:
        detector: The quantized detector; it stays in eval mode.
        loss: The filtered global loss.

    Attributes:
        target: The float detector's predictions on the current batch, set by ``FilteredGlobalLossHook``.
    """

    def __init__(self, detector: nn.Module, loss: FilteredGlobalLoss) -> None:
        super().__init__(data_preprocessor=_TestPreprocessor(detector.data_preprocessor))
        self.detector = detector
        self.loss = loss
        self.target: AlignedPredictions | None = None

    def train(self, mode: bool = True) -> GlobalLossModel:
        super().train(mode)
        self.detector.eval()
        return self

    def init_weights(self) -> None:
        """Does nothing: mmengine calls it before training, and the weights are the trained ones."""

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'loss') -> dict[str, Tensor]:
        """Returns the loss terms; there is no other mode.

        Args:
            inputs: (N, 3, H, W) preprocessed images.
            data_samples: Meta information of the N images; for ``target='ground_truth'`` with ``gt_instances``
                in pixels of the network input, as pipelines leave them that load annotations before resizing.
            mode: ``'loss'``.
        """
        if mode != 'loss':
            raise ValueError(f"GlobalLossModel only has mode 'loss', got {mode!r}")
        student = predict_aligned(self.detector, inputs, data_samples, reference=self.target)
        gt = None
        if self.loss.target == 'ground_truth':
            if not all('gt_instances' in sample and 'bboxes' in sample.gt_instances for sample in data_samples):
                raise PTQError("`ptq.global_loss.target='ground_truth'` needs annotated calibration images; use "
                               "target='float' for images without annotations.")
            gt = [sample.gt_instances for sample in data_samples]
        return self.loss(student, self.target, gt)

    @torch.no_grad()
    def held_out_loss(self, data: dict) -> dict[str, float]:
        """The loss terms of one batch, and their sum as ``loss``."""
        data = self.data_preprocessor(data, False)
        _, terms = self.parse_losses(self(**data, mode='loss'))
        return {key: float(value) for key, value in terms.items()}
