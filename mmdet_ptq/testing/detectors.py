"""Tiny detectors that behave like trained ones: activations of order one, normalisations that do something."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mmdet.models.dense_heads import EmbeddingRPNHead
from mmdet.models.detectors import SingleStageDetector
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_ptq.testing.data import tiny_batch
from mmdet_ptq.testing.models import MODELS, tiny_model_cfg

KINDS = tuple(MODELS)


def tiny_detector(kind: str, seed: int = 0) -> nn.Module:
    """Builds a tiny detector with random weights and statistics that fit them.

    Args:
        kind: See :func:`mmdet_ptq.testing.tiny_model_cfg`.
        seed: Seed of the weights and the statistics; torch's global generator is left as it was. Defaults to 0.

    Returns:
        A float mmdet detector for images of (3, 64, 64) and 3 classes, in eval mode.
    """
    from mmdet.registry import MODELS as MMDET_MODELS

    init_default_scope('mmdet')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = MMDET_MODELS.build(ConfigDict(tiny_model_cfg(kind)))
        randomise(detector, lambda: _features(detector))
    return detector.eval()


def _features(detector: nn.Module) -> None:
    features = detector.extract_feat(detector.data_preprocessor(tiny_batch(16), False)['inputs'])
    if isinstance(detector, SingleStageDetector) and hasattr(detector, 'bbox_head'):
        detector.bbox_head(features)


@torch.no_grad()
def randomise(detector: nn.Module, run: Callable[[], object]) -> None:
    """Gives a detector random weights that keep the scale of what passes; mmdet's own start leaves outputs constant.

    Args:
        detector: The detector, changed in place; torch's global generator draws.
        run: A forward pass, whose statistics the batch normalisations take.
    """
    for module in detector.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
        if isinstance(module, EmbeddingRPNHead):
            # centre and size, as shares of the image's: drawn as mmdet leaves them, some would be turned inside out
            module.init_proposal_bboxes.weight.uniform_(0.3, 0.7)
    if hasattr(detector, 'level_embed'):
        detector.level_embed.normal_()  # transformers allocate it without values
    for parameter in detector.parameters():
        if parameter.numel() == 1 and not parameter.any():
            parameter.fill_(0.5)  # what it multiplies would be nothing
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    followed = [norm for norm in norms if norm.track_running_stats]
    for norm in norms:
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    for norm in followed:
        norm.train()
        norm.momentum = 1.0  # the statistics of this one batch
    run()
    for norm in followed:
        norm.eval()
        norm.momentum = 0.1
        norm.num_batches_tracked.zero_()
        # a channel that hardly varied in this batch would blow up on others
        norm.running_var.clamp_(min=0.3 * norm.running_var.mean().item())
