"""A config's float detector, with weights or without, and generated images for it."""

from __future__ import annotations

import copy

import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import nn

from mmdet_ptq.calibration.images import test_pipeline
from mmdet_ptq.compat import replace_sync_bn
from mmdet_ptq.errors import PTQError


def build_detector(cfg: Config) -> nn.Module:
    """A config's detector with fresh weights."""
    from mmdet.registry import MODELS

    model = copy.deepcopy(cfg.model)
    replace_sync_bn(model)
    if cfg.get('data_preprocessor'):
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(model)


def pipeline_size(cfg: Config) -> tuple[int, int]:
    """Height and width that the test pipeline resizes to.

    Raises:
        PTQError: It does not tell, or keeps the ratio of each image.
    """
    for step in test_pipeline(cfg):
        if step['type'] in ('Resize', 'mmdet.Resize') and step.get('scale'):
            width, height = step['scale']
            if width == height or not step.get('keep_ratio'):
                return height, width
    raise PTQError('the test pipeline gives images of many sizes; write CONFIG@HEIGHTxWIDTH.')


def generated_batches(size: tuple[int, int], count: int, seed: int) -> list[dict]:
    """Batches of one image: coarse blocks with noise, as a dataloader yields them."""
    generator = torch.Generator().manual_seed(seed)
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    batches = []
    for number in range(count):
        coarse = torch.randint(0, 200, (1, 3, 8, 8), generator=generator).float()
        image = nn.functional.interpolate(coarse, size=size)[0] + torch.randint(0, 56, (3, *size), generator=generator)
        batches.append(
            dict(inputs=[image.to(torch.uint8)], data_samples=[DetDataSample(metainfo=dict(meta, img_id=number))])
        )
    return batches


@torch.no_grad()
def settle_norms(detector: nn.Module, batches: list[dict]) -> None:
    """Gives normalisations the statistics of the images: without them activations overflow or vanish."""
    norms = [module for module in detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    inputs = torch.cat([detector.data_preprocessor(copy.deepcopy(batch), False)['inputs'] for batch in batches])
    detector.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
    detector(inputs, None, mode='tensor')
