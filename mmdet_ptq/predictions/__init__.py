"""Every head family's raw outputs as aligned scores and boxes, before NMS."""

from mmdet_ptq.predictions import heads, masks  # noqa: F401  register mmdet's heads
from mmdet_ptq.predictions.aligned import AlignedPredictions, Masks
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
    'Masks',
    'adapter',
    'align_head',
    'align_raw',
    'check_no_tracker',
    'check_raw_outputs',
    'needs_reference',
    'predict_aligned',
    'raw_predictions',
]
