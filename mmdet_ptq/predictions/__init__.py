"""Every head family's raw outputs as aligned scores and boxes, before NMS."""

from . import heads  # noqa: F401  registers mmdet's heads
from .aligned import AlignedPredictions
from .dispatch import adapter, align_head, align_raw
from .forward import needs_reference, predict_aligned, raw_predictions

__all__ = ['AlignedPredictions', 'adapter', 'align_head', 'align_raw', 'needs_reference', 'predict_aligned',
           'raw_predictions']
