"""Tiny detectors for sensitivity and protection, one of them with a tensor made bad on purpose."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector
from mmdet_ptq.wrapping import Structure, prepare_detector

BAD = 'backbone.layer3.1.depthwise_conv.conv'
OBSERVE = dict(preset='w8a8_observe', activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')))
PER_TENSOR = dict(
    preset='w8a8_observe', activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver'), depthwise_per_channel=False)
)


def images(seed: int = 5) -> list[dict]:
    return [tiny_batch(1, seed=seed)]


def ranges() -> list[dict]:
    return [tiny_batch(2, seed=1)]


def prepared(detector: nn.Module, cfg: PTQConfig) -> tuple[nn.Module, Structure]:
    detector = copy.deepcopy(detector)
    structure = prepare_detector(detector, cfg, lambda: predict(detector, tiny_batch(1)))
    observe_activations(detector, ranges(), structure)
    return detector, structure


@torch.no_grad()
def with_a_bad_tensor() -> nn.Module:
    """A detector that computes the same as before in float, with one channel of one depthwise input scaled up."""
    detector = tiny_detector('ssd')
    for module in list(detector.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())  # scales pass through it
    block = detector.get_submodule(BAD.rpartition('.depthwise')[0])
    block.expand_conv.bn.weight[0] *= 1024
    block.expand_conv.bn.bias[0] *= 1024
    block.depthwise_conv.conv.weight[0] /= 1024
    return detector
