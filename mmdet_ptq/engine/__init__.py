"""How a run goes."""

from mmdet_ptq.engine.api import load_exported, load_quantized, quantize
from mmdet_ptq.engine.evaluation import evaluate
from mmdet_ptq.engine.global_stage.hooks import FilteredGlobalLossHook
from mmdet_ptq.engine.global_stage.loops import GlobalCalibrationLoop, HeldOutLossLoop
from mmdet_ptq.engine.global_stage.optim import QuantizationParamsConstructor
from mmdet_ptq.engine.runner import PTQRunner
from mmdet_ptq.engine.told import ProgressHook

__all__ = [
    'FilteredGlobalLossHook',
    'GlobalCalibrationLoop',
    'HeldOutLossLoop',
    'PTQRunner',
    'ProgressHook',
    'QuantizationParamsConstructor',
    'evaluate',
    'load_exported',
    'load_quantized',
    'quantize',
]
