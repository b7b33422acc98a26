"""Every head family's raw outputs as aligned scores and boxes, before NMS."""

from mmdet_ptq.predictions import heads  # noqa: F401  registers mmdet's heads
from mmdet_ptq.predictions.aligned import AlignedPredictions
from mmdet_ptq.predictions.dispatch import adapter, align_head, align_raw
from mmdet_ptq.predictions.forward import (
    check_no_tracker,
    check_raw_outputs,
    needs_reference,
    predict_aligned,
    raw_predictions,
)

__all__ = [
    'AlignedPredictions',
    'adapter',
    'align_head',
    'align_raw',
    'check_no_tracker',
    'check_raw_outputs',
    'needs_reference',
    'predict_aligned',
    'raw_predictions',
]
