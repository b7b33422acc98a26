"""One forward pass of a whole detector, float or quantized, to its aligned predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mmdet.models.detectors import MaskFormer, SemiBaseDetector, SingleStageDetector
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from mmdet.models.mot import BaseMOTModel
from mmdet.registry import MODELS
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions.aligned import AlignedPredictions, Regions
from mmdet_ptq.predictions.dispatch import align_head
from mmdet_ptq.predictions.prototypes import align_prototypes, answering_with_prototypes, has_prototypes
from mmdet_ptq.predictions.queries import chooses_queries, chosen_queries
from mmdet_ptq.predictions.samples import with_annotations
from mmdet_ptq.predictions.stock import runs_as
from mmdet_ptq.predictions.two_stage import is_two_stage, predict_two_stage


def raw_predictions(detector: nn.Module, batch_inputs: Tensor, batch_data_samples: list) -> Any:
    """Returns what the detector's ``mode='tensor'`` forward returns.

    The root module itself is called, never its parts: quantized detectors reset their per-call state there.

    Args:
        detector: Float or quantized detector, or its data parallel wrapper.
        batch_inputs: (N, C, H, W) preprocessed images.
        batch_data_samples: Meta information of the N images.
    """
    with _same_part(detector), answering_with_prototypes(predicting_part(detector)):
        return detector(batch_inputs, with_annotations(batch_data_samples), mode='tensor')


def check_no_tracker(model: nn.Module | Mapping) -> None:
    """Refuses what follows objects through videos: its detector is what there is to quantize.

    Args:
        model: A detector, or its config; trackers may need packages to be built.

    Raises:
        PTQError: It is one of mmdet's trackers.
    """
    kind = model.get('type') if isinstance(model, Mapping) else type(model)
    if isinstance(kind, str):
        kind = MODELS.module_dict.get(kind.rpartition('.')[2])
    if isinstance(kind, type) and issubclass(kind, BaseMOTModel):
        raise PTQError(
            f'{kind.__name__} follows objects through videos; quantize its detector by a config of its own, whose '
            "`model` is the tracker's `model.detector` with a `data_preprocessor` of the type DetDataPreprocessor, "
            "whose data sets hold images, and whose `load_from` may be the tracker's checkpoint, then put it in: "
            "tracker.detector = load_quantized('quantized.pth')."
        )


def check_raw_outputs(detector: nn.Module) -> None:
    """Refuses detectors that have no raw outputs to learn from.

    Raises:
        PTQError: The detector needs annotations for ``mode='tensor'``, as YOLACT and CondInst would.
    """
    if runs_as(detector, SingleStageInstanceSegmentor) and detector.with_bbox and not has_prototypes(detector):
        raise PTQError(
            f'{type(detector).__name__} computes its raw outputs from annotated objects, so that `ptq.protect`, '
            "`reconstruct` and `global_loss` have nothing to compare; quantize it with preset='w8a8_observe'."
        )


def predicting_part(detector: nn.Module) -> nn.Module:
    """The detector that predicts: a semi-supervised one holds two, any other is it itself."""
    model = detector.module if is_model_wrapper(detector) else detector
    if isinstance(model, SemiBaseDetector):
        return getattr(model, 'teacher' if model.semi_test_cfg.get('predict_on', 'teacher') == 'teacher' else 'student')
    return model


@contextmanager
def _same_part(detector: nn.Module) -> Iterator[None]:
    """Raw outputs of a semi-supervised detector come from the part that predicts, whatever its config says."""
    model = detector.module if is_model_wrapper(detector) else detector
    if not isinstance(model, SemiBaseDetector):
        yield
        return
    before = model.semi_test_cfg
    model.semi_test_cfg = {**before, 'forward_on': before.get('predict_on', 'teacher')}
    try:
        yield
    finally:
        model.semi_test_cfg = before


def needs_reference(detector: nn.Module) -> bool:
    """Returns whether a quantized detector pairs with the float one only where it is told what that looked at."""
    model = predicting_part(detector)
    return is_two_stage(model) or chooses_queries(model)


def predict_aligned(
    detector: nn.Module, batch_inputs: Tensor, batch_data_samples: list, reference: AlignedPredictions | None = None
) -> AlignedPredictions:
    """Runs the detector (in eval mode) and aligns its predictions before NMS.

    Args:
        detector: Float or quantized detector, or its data parallel wrapper.
        batch_inputs: (N, C, H, W) preprocessed images.
        batch_data_samples: Meta information of the N images.
        reference: The float detector's predictions on the same images. Two-stage
            detectors need them: the quantized second stage is evaluated on the float detector's proposals and
            classes, the decoder of a two-stage DETR on its queries. Ignored by all others. Defaults to None.

    Raises:
        PTQError: If the detector is in training mode.
    """
    model = predicting_part(detector)
    if is_two_stage(model):
        with _same_part(detector):
            return predict_two_stage(detector, model, batch_inputs, batch_data_samples, reference)
    metas = [sample.metainfo for sample in batch_data_samples]
    if chooses_queries(model):
        given = None if reference is None else reference.regions.queries
        with chosen_queries(model, given) as queries:
            outputs = raw_predictions(detector, batch_inputs, batch_data_samples)
        return replace(_align(model, outputs, metas), regions=Regions(queries=queries))
    outputs = raw_predictions(detector, batch_inputs, batch_data_samples)
    return _align(model, outputs, metas)


def _align(model: nn.Module, outputs: Any, metas: list[dict]) -> AlignedPredictions:
    """By the head; or as a whole, where the forward is its own: align_head.register(MyDetector) teaches it."""
    if runs_as(model, SingleStageDetector) or runs_as(model, DetectionTransformer):
        return align_head(model.bbox_head, outputs, metas)
    if has_prototypes(model):
        return align_prototypes(model, outputs)
    if runs_as(model, SingleStageInstanceSegmentor) and not model.with_bbox:
        return align_head(model.mask_head, *outputs, metas)
    if runs_as(model, MaskFormer):
        return align_head(model.panoptic_head, outputs, metas)
    return align_head(model, outputs, metas)
