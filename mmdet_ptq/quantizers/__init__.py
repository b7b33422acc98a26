"""Number formats: a tensor in, integer codes and the simulated tensor out; and the observers that find their ranges."""
from .affine import AffineQuantizer
from .base import Quantizer
from .log_affine import LogAffineQuantizer
from .observers import (
                        HistogramObserver,
                        KLObserver,
                        MinMaxObserver,
                        MovingAverageObserver,
                        MSEObserver,
                        Observer,
                        PercentileObserver,
)
from .rounding import LearnedRounding
from .saturation import SUM_LIMIT, Neighbours
from .selection import build_observer, build_quantizer, fit_best, resolve_auto, weight_error

__all__ = [
    'AffineQuantizer', 'HistogramObserver', 'KLObserver', 'LearnedRounding', 'LogAffineQuantizer', 'MSEObserver',
    'MinMaxObserver', 'MovingAverageObserver', 'Neighbours', 'Observer', 'PercentileObserver', 'Quantizer',
    'SUM_LIMIT', 'build_observer', 'build_quantizer', 'fit_best', 'resolve_auto', 'weight_error'
]
