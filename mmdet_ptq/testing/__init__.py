"""Tiny detectors and a tiny COCO for tests, ours and the users'."""
from .calibrated import predict, raw_outputs, tiny_quantized
from .configs import tiny_config
from .data import tiny_batch, tiny_coco
from .detectors import KINDS, tiny_detector
from .models import NUM_CLASSES, SIZE, tiny_model_cfg

__all__ = ['KINDS', 'NUM_CLASSES', 'SIZE', 'predict', 'raw_outputs', 'tiny_batch', 'tiny_coco', 'tiny_config',
           'tiny_detector', 'tiny_model_cfg', 'tiny_quantized']
