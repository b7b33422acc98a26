"""The ``ptq`` block of a config: typed sections, presets resolved, validated with did-you-mean."""
from .block import KEYS, PTQConfig, apply_policy
from .sections import CalibrationConfig, GlobalLossConfig, ProtectConfig, ReconstructConfig, TensorConfig

__all__ = ['KEYS', 'CalibrationConfig', 'GlobalLossConfig', 'PTQConfig', 'ProtectConfig', 'ReconstructConfig',
           'TensorConfig', 'apply_policy']
