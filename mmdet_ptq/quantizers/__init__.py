"""Number formats: a tensor in, integer codes and the simulated tensor out; and the observers that find their ranges."""

from mmdet_ptq.quantizers.affine import AffineQuantizer
from mmdet_ptq.quantizers.base import Quantizer
from mmdet_ptq.quantizers.log_affine import LogAffineQuantizer
from mmdet_ptq.quantizers.observers import (
    FisherObserver,
    HistogramObserver,
    KLObserver,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
)
from mmdet_ptq.quantizers.rounding import LearnedRounding
from mmdet_ptq.quantizers.saturation import SUM_LIMIT, Neighbours
from mmdet_ptq.quantizers.selection import build_observer, build_quantizer, fit_best, resolve_auto, weight_error

__all__ = [
    'AffineQuantizer',
    'HistogramObserver',
    'KLObserver',
    'LearnedRounding',
    'LogAffineQuantizer',
    'FisherObserver',
    'MSEObserver',
    'MinMaxObserver',
    'MovingAverageObserver',
    'Neighbours',
    'Observer',
    'PercentileObserver',
    'Quantizer',
    'SUM_LIMIT',
    'build_observer',
    'build_quantizer',
    'fit_best',
    'resolve_auto',
    'weight_error',
]
