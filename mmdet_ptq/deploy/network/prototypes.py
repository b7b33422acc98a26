"""Detectors of one stage that draw masks from prototypes of the image, as their boxes say: YOLACT, CondInst.

Their network gives what the box head says and the prototypes; mmdet's own code chooses boxes and draws their masks.
"""

from __future__ import annotations

from collections.abc import Callable

from mmdet.models.dense_heads import CondInstMaskHead, YOLACTProtonet
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from torch import Tensor, nn

from mmdet_ptq.predictions.stock import runs_as

# the layers of a mask head that make prototypes, and what they read of the features
_LAYERS = {
    YOLACTProtonet: ('protonet', lambda features: features[0]),
    CondInstMaskHead: ('mask_feature_head', lambda features: features),
}


def has_prototypes(detector: nn.Module) -> bool:
    """Returns whether a detector runs as mmdet's with boxes and prototypes do."""
    return runs_as(detector, SingleStageInstanceSegmentor) and detector.with_bbox and _kind(detector) is not None


def prototype_heads(detector: nn.Module) -> list[nn.Module]:
    """The box head, and the layers that make prototypes."""
    return [detector.bbox_head, getattr(detector.mask_head, _LAYERS[_kind(detector)][0])]


def prototype_network(detector: nn.Module) -> Callable[[Tensor], tuple]:
    """What the two give of an image."""
    read = _LAYERS[_kind(detector)][1]

    def forward(image: Tensor) -> tuple:
        features = detector.extract_feat(image)
        boxes, prototypes = prototype_heads(detector)
        return boxes(features), prototypes(read(features))

    return forward


def _kind(detector: nn.Module) -> type | None:
    """The class of mmdet's whose forward the mask head has."""
    head = detector.mask_head
    return next((kind for kind in _LAYERS if isinstance(head, kind) and type(head).forward is kind.forward), None)
