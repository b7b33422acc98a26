"""The ``ptq`` block of a config: typed sections, presets resolved, validated with did-you-mean."""

from mmdet_ptq.config.block import DYNAMIC, KEYS, POLICY_KEYS, PTQConfig, apply_policy
from mmdet_ptq.config.checks import check_seed
from mmdet_ptq.config.formats import check_format
from mmdet_ptq.config.sections import (
    CalibrationConfig,
    GlobalLossConfig,
    ProtectConfig,
    ReconstructConfig,
    TensorConfig,
)

__all__ = [
    'DYNAMIC',
    'KEYS',
    'POLICY_KEYS',
    'CalibrationConfig',
    'GlobalLossConfig',
    'PTQConfig',
    'ProtectConfig',
    'ReconstructConfig',
    'TensorConfig',
    'apply_policy',
    'check_format',
    'check_seed',
]
