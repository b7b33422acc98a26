"""Tiny detectors and a tiny COCO for tests, ours and the users'."""

from mmdet_ptq.testing.calibrated import predict, raw_outputs, tiny_quantized
from mmdet_ptq.testing.configs import tiny_config
from mmdet_ptq.testing.data import tiny_batch, tiny_coco
from mmdet_ptq.testing.detectors import KINDS, tiny_detector
from mmdet_ptq.testing.models import NUM_CLASSES, SIZE, tiny_model_cfg

__all__ = [
    'KINDS',
    'NUM_CLASSES',
    'SIZE',
    'predict',
    'raw_outputs',
    'tiny_batch',
    'tiny_coco',
    'tiny_config',
    'tiny_detector',
    'tiny_model_cfg',
    'tiny_quantized',
]
