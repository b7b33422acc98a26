"""How a run goes."""
from .api import load_quantized, quantize
from .evaluation import evaluate
from .hooks import FilteredGlobalLossHook
from .loops import GlobalCalibrationLoop, HeldOutLossLoop
from .optim import QuantizationParamsConstructor
from .runner import PTQRunner

__all__ = ['FilteredGlobalLossHook', 'GlobalCalibrationLoop', 'HeldOutLossLoop', 'PTQRunner',
           'QuantizationParamsConstructor', 'evaluate', 'load_quantized', 'quantize']
