"""One forward pass of a whole detector, float or quantized, to its aligned predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmdet.models.detectors import SingleStageDetector
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from mmdet_ptq.predictions.aligned import AlignedPredictions, Regions
from mmdet_ptq.predictions.dispatch import align_head
from mmdet_ptq.predictions.queries import chooses_queries, chosen_queries
from mmdet_ptq.predictions.two_stage import is_two_stage, predict_two_stage


def raw_predictions(detector: nn.Module, batch_inputs: Tensor, batch_data_samples: list) -> Any:
    """Returns what the detector's ``mode='tensor'`` forward returns.

    The root module itself is called, never its parts: quantized detectors reset their per-call state there.

    Args:
        detector: Float or quantized detector, or its data parallel wrapper.
        batch_inputs: (N, 3, H, W) preprocessed images.
        batch_data_samples: Meta information of the N images.
    """
    return detector(batch_inputs, batch_data_samples, mode='tensor')


def needs_reference(detector: nn.Module) -> bool:
    """Returns whether a quantized detector pairs with the float one only where it is told what that looked at."""
    return is_two_stage(detector) or chooses_queries(detector)


def predict_aligned(
    detector: nn.Module, batch_inputs: Tensor, batch_data_samples: list, reference: AlignedPredictions | None = None
) -> AlignedPredictions:
    """Runs the detector (in eval mode) and aligns its predictions before NMS.

    Args:
        detector: Float or quantized detector, or its data parallel wrapper.
        batch_inputs: (N, 3, H, W) preprocessed images.
        batch_data_samples: Meta information of the N images.
        reference: The float detector's predictions on the same images. Two-stage
            detectors need them: the quantized second stage is evaluated on the float detector's proposals and
            classes, the decoder of a two-stage DETR on its queries. Ignored by all others. Defaults to None.

    Raises:
        PTQError: If the detector is in training mode.
    """
    model = detector.module if is_model_wrapper(detector) else detector
    if is_two_stage(model):
        return predict_two_stage(detector, model, batch_inputs, batch_data_samples, reference)
    metas = [sample.metainfo for sample in batch_data_samples]
    if chooses_queries(model):
        given = None if reference is None else reference.regions.queries
        with chosen_queries(model, given) as queries:
            outputs = raw_predictions(detector, batch_inputs, batch_data_samples)
        return replace(align_head(model, outputs, metas), regions=Regions(queries=queries))
    outputs = raw_predictions(detector, batch_inputs, batch_data_samples)
    # a detector with a forward of its own may be taught as a whole: align_head.register(MyDetector)
    plain = isinstance(model, SingleStageDetector) and type(model)._forward is SingleStageDetector._forward
    return align_head(model.bbox_head if plain else model, outputs, metas)
