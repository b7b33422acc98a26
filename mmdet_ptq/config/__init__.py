"""The ``ptq`` block of a config: typed sections, presets resolved, validated with did-you-mean."""
from .block import KEYS, POLICY_KEYS, PTQConfig, apply_policy
from .formats import check_format
from .sections import CalibrationConfig, GlobalLossConfig, ProtectConfig, ReconstructConfig, TensorConfig

__all__ = ['KEYS', 'POLICY_KEYS', 'CalibrationConfig', 'GlobalLossConfig', 'PTQConfig', 'ProtectConfig',
           'ReconstructConfig', 'TensorConfig', 'apply_policy', 'check_format']
