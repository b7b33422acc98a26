"""Detectors of one stage that draw masks from prototypes of the image, as their boxes say: YOLACT, CondInst.

Their network gives what the box head says and the prototypes; mmdet's own code chooses boxes and draws their masks.
mmdet's own raw outputs are other ones: masks of annotated objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmdet.models.dense_heads import CondInstBboxHead, CondInstMaskHead, YOLACTHead, YOLACTProtonet
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_ptq.predictions.aligned import AlignedPredictions
from mmdet_ptq.predictions.dispatch import align_raw, check_eval, flatten_levels, own_decoding
from mmdet_ptq.predictions.heads import align_boxes, priors_of
from mmdet_ptq.predictions.masks import by_image
from mmdet_ptq.predictions.stock import runs_as


def _combine(detector: nn.Module, prototypes: Tensor, chosen: Tensor, coefficients: Tensor, _) -> Tensor:
    """YOLACT: a sum of prototypes."""
    return (coefficients[chosen] @ prototypes.flatten(1)).unflatten(1, prototypes.shape[1:])


def _convolve(detector: nn.Module, prototypes: Tensor, chosen: Tensor, coefficients: Tensor, priors: Tensor) -> Tensor:
    """CondInst: a small network of the object's own, around its place."""
    told = InstanceData(param_preds=coefficients[chosen], points=priors[chosen, :2], strides=priors[chosen, 2])
    return detector.mask_head.forward_single(prototypes, told)[0]


@dataclass(frozen=True)
class _Kind:
    """How a detector makes prototypes, and masks of them.

    Attributes:
        mask_head: The class of mmdet's whose forward the mask head has.
        box_head: That which decodes its boxes.
        layers: The layers of the mask head that make prototypes.
        read: What they read of the features.
        coefficients: The box head's attribute that says how many numbers of an object draw its mask.
        draw: Detector, prototypes of an image, which of its priors, coefficients (P, ...) and priors (P, ...), to the
            logits of the masks.
    """

    mask_head: type
    box_head: type
    layers: str
    read: Callable[[tuple[Tensor, ...]], Any]
    coefficients: str
    draw: Callable[..., Tensor]


_KINDS = (
    _Kind(YOLACTProtonet, YOLACTHead, 'protonet', lambda features: features[0], 'num_protos', _combine),
    _Kind(CondInstMaskHead, CondInstBboxHead, 'mask_feature_head', lambda features: features, 'num_params', _convolve),
)


def has_prototypes(detector: nn.Module) -> bool:
    """Returns whether a detector runs as mmdet's with boxes and prototypes do."""
    return runs_as(detector, SingleStageInstanceSegmentor) and detector.with_bbox and _kind(detector) is not None


def prototype_heads(detector: nn.Module) -> list[nn.Module]:
    """The box head, and the layers that make prototypes."""
    return [detector.bbox_head, getattr(detector.mask_head, _kind(detector).layers)]


def prototype_network(detector: nn.Module) -> Callable[[Tensor], tuple]:
    """What the two give of an image."""
    read = _kind(detector).read

    def forward(image: Tensor) -> tuple:
        features = detector.extract_feat(image)
        boxes, prototypes = prototype_heads(detector)
        return boxes(features), prototypes(read(features))

    return forward


@contextmanager
def answering_with_prototypes(detector: nn.Module) -> Iterator[None]:
    """While it lasts, raw outputs are those of the network; other detectors' stay as they are."""
    if not has_prototypes(detector):
        yield
        return
    network = prototype_network(detector)
    detector._forward = lambda image, *_, **__: network(image)
    try:
        yield
    finally:
        del detector._forward


def align_prototypes(detector: nn.Module, outputs: tuple) -> AlignedPredictions:
    """Boxes as the box head decodes them; masks before they are cut at their box."""
    kind, head, ((*maps, coefficient_maps), prototypes) = _kind(detector), detector.bbox_head, outputs
    if not isinstance(head, kind.box_head) or own_decoding(type(head), kind.box_head):
        return align_raw(
            detector, outputs, f'{type(head).__name__} decodes in another way than {kind.box_head.__name__}'
        )
    check_eval(head)
    coefficients = flatten_levels(coefficient_maps, getattr(head, kind.coefficients))
    with_stride = kind.box_head is CondInstBboxHead
    priors = priors_of(head, maps[0], with_stride=True) if with_stride else priors_of(head, maps[0])

    def draw(image: int, chosen: Tensor) -> Tensor:
        return kind.draw(detector, prototypes[image].to(priors.dtype), chosen, coefficients[image], priors)

    return align_boxes(head, tuple(maps), masks=by_image(draw))


def _kind(detector: nn.Module) -> _Kind | None:
    head = detector.mask_head
    return next(
        (kind for kind in _KINDS if isinstance(head, kind.mask_head) and type(head).forward is kind.mask_head.forward),
        None,
    )
