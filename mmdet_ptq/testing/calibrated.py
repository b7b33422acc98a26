"""Tiny detectors quantized from range observers alone, and the outputs tests compare."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.testing.data import tiny_batch
from mmdet_ptq.testing.detectors import tiny_detector
from mmdet_ptq.wrapping import Structure, prepare_detector
from mmdet_ptq.wrapping.watching.tensors import tensors_in

MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
# 8 bits; min-max, because searching ranges takes most of the time of a tiny detector
OBSERVE = dict(preset='w8a8_observe', weights=MIN_MAX, activations=MIN_MAX)


def tiny_quantized(kind: str, ptq: dict | None = None, seed: int = 0) -> tuple[nn.Module, Structure]:
    """A tiny detector, prepared and observed.

    Args:
        kind: See :func:`mmdet_ptq.testing.tiny_model_cfg`.
        ptq: The ``ptq`` block. Defaults to :data:`OBSERVE`, 8 bits from min-max ranges.
        seed: Seed of the weights. Defaults to 0.

    Returns:
        The quantized detector in eval mode, and its structure.
    """
    detector = tiny_detector(kind, seed)
    cfg = PTQConfig.from_dict(ptq or OBSERVE)
    structure = prepare_detector(detector, cfg, lambda: predict(detector, tiny_batch(1)))
    observe_activations(detector, [tiny_batch(2, seed=1)], structure)
    return detector, structure


@torch.no_grad()
def raw_outputs(detector: nn.Module, batch: dict | None = None) -> list[Tensor]:
    """Every tensor of the detector's ``mode='tensor'`` forward pass, in order.

    Args:
        detector: A detector, float or quantized.
        batch: Batch as a dataloader yields it; it is not changed. Defaults to ``tiny_batch(2)``.
    """
    data = detector.data_preprocessor(copy.deepcopy(batch or tiny_batch(2)), False)
    return list(tensors_in(detector(**data, mode='tensor')))


def predict(detector: nn.Module, batch: dict) -> list:
    """The detector's predictions for a batch as a dataloader yields it; the batch is not changed."""
    return detector(**detector.data_preprocessor(copy.deepcopy(batch), False), mode='predict')
