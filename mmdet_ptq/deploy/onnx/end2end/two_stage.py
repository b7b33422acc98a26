"""A detector with two stages as one graph: proposals, regions, boxes and masks between its layers, in float.

Regions are read by ONNX's RoiAlign, which computes as mmcv's RoIAlign does. All shapes but the number of regions of a
level are constant: places without a proposal or a detection are computed, too, and count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from mmcv.ops import RoIAlign
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import delta2bbox
from torch import Tensor, nn

from mmdet_ptq.deploy.network.meta import MOST_REGIONS
from mmdet_ptq.deploy.network.parts import called, proposes
from mmdet_ptq.deploy.onnx.end2end.decoding import ProposalDecoding
from mmdet_ptq.deploy.onnx.end2end.suppression import Candidates, Suppression, nms_trouble
from mmdet_ptq.deploy.onnx.nodes import OPSET
from mmdet_ptq.wrapping.state import STATE

# what has to be as these classes have it, by the attribute of a RoI head
_METHODS: dict[type, tuple[str, ...]] = {
    StandardRoIHead: ('predict', 'predict_bbox', 'predict_mask'),
    CascadeRoIHead: ('predict', 'predict_bbox', 'predict_mask', '_refine_roi', '_bbox_forward', '_mask_forward'),
    BBoxHead: ('predict_by_feat', '_predict_by_feat_single', 'regress_by_class'),
    FCNMaskHead: ('predict_by_feat', '_predict_by_feat_single'),
}
_symbolic = partial(torch.onnx.ops.symbolic, version=OPSET)


class TwoStages(nn.Module):
    """Image in, detections out; only to be exported, its suppression and its regions have no values in PyTorch.

    Args:
        detector: The detector, float or quantized, in eval mode; :func:`two_stage_trouble` says whether it may be.
        outputs: What its first network returns for an image tensor: its maps tell the grids of the priors.
    """

    def __init__(self, detector: nn.Module, outputs: Sequence[Any]) -> None:
        super().__init__()
        _, (scores, _), *_ = outputs
        self.detector = detector
        self.decoding = ProposalDecoding(detector.rpn_head, [maps.shape[-2:] for maps in scores])
        self.proposing = Suppression(detector.rpn_head.test_cfg)
        self.suppression = Suppression(self.roi_head.test_cfg)
        self.regions = self.proposing.count
        self.threshold = self.roi_head.test_cfg['score_thr']
        self.cascade = isinstance(self.roi_head, CascadeRoIHead)
        self.names = ('boxes', 'scores', 'labels', *(['masks'] if self.roi_head.with_mask else []))

    @property
    def roi_head(self) -> nn.Module:
        """The detector's; as a module of this one, too, it would have two names while it is traced."""
        return self.detector.roi_head

    def forward(self, input: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Detections, best first.

        Args:
            input: (N, C, H, W), normalized as mmdet's data preprocessor does.
            size: (N, 2), height and width of each image within its tensor.

        Returns:
            Boxes (N, K, 4) as x1, y1, x2, y2 in pixels of the input, scores (N, K) and labels (N, K), int64, as of a
            detector with one stage. Where the detector has masks, these (N, K, h, w), too: probabilities on a grid
            over each box, which is what a mask head gives.
        """
        with called(self.detector, self._detections):
            return self.detector(input, size)

    def _detections(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        features = self.detector.extract_feat(image)
        found = self.detector.rpn_head(features)
        flow = getattr(getattr(self.detector, STATE, None), 'flow', None)
        extractors = [module for module in self.roi_head.modules() if isinstance(module, BaseRoIExtractor)]
        with ExitStack() as stack:
            # what stands between the layers is none of the operations that are quantized
            stack.enter_context(nullcontext() if flow is None else flow.muted())
            for extractor in extractors:
                stack.enter_context(mock.patch.object(extractor, 'forward', partial(_pooled, extractor)))
            border = size[:, [1, 0, 1, 0]][:, None]
            proposals, _, levels = self.proposing(self.decoding(found, border))
            boxes, scores, labels = self.suppression(self._boxes(features, proposals, levels >= 0, border))
            if len(self.names) == 3:
                return boxes, scores, labels
            return boxes, scores, labels, self._masks(features, boxes, labels)

    def _boxes(self, features: Sequence[Tensor], boxes: Tensor, present: Tensor, border: Tensor) -> Candidates:
        """What the second stage finds in each proposal: all classes (N, K * C)."""
        images, count = present.shape
        if self.cascade:
            heads, told = list(self.roi_head.bbox_head), []
            for stage, head in enumerate(heads):
                result = self.roi_head._bbox_forward(stage, features, _rois(boxes))
                told.append(result['cls_score'])
                found = _decoded(head, boxes, result['bbox_pred'], border)
                if stage < len(heads) - 1:
                    boxes = _of_class(head, result['cls_score'], found)
            head, logits = heads[-1], sum(told) / float(len(told))
        else:
            head, result = self.roi_head.bbox_head, self.roi_head._bbox_forward(features, _rois(boxes))
            logits, found = result['cls_score'], _decoded(self.roi_head.bbox_head, boxes, result['bbox_pred'], border)
        # the background is last; OpenVINO loses a slice in this place
        scores = logits.softmax(-1).split([head.num_classes, 1], -1)[0].reshape(images, count, head.num_classes)
        scores = torch.where((scores > self.threshold) & present[..., None], scores, 0.0)
        labels = torch.arange(head.num_classes, device=scores.device).expand_as(scores)
        found = found.expand(-1, -1, head.num_classes, -1)
        return Candidates(found.flatten(1, 2), scores.flatten(1), labels.flatten(1))

    def _masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        rois, present = _rois(boxes), (labels >= 0)[..., None, None]
        heads = _each(self.roi_head.mask_head)
        label = torch.zeros_like(labels) if heads[-1].class_agnostic else labels.clamp(min=0)
        drawn = []
        for stage in range(len(heads)):
            place = (stage,) if self.cascade else ()
            found = self.roi_head._mask_forward(*place, features, rois)['mask_preds']
            at = label.flatten()[:, None, None, None].expand(-1, 1, *found.shape[2:])
            drawn.append(found.gather(1, at).sigmoid())
        mean = sum(drawn) / float(len(drawn))
        return torch.where(present, mean.reshape(*labels.shape, *mean.shape[2:]), 0.0)


def _rois(boxes: Tensor) -> Tensor:
    """(N, K, 4) as mmdet's regions (N * K, 5), the image's number first."""
    images, count = boxes.shape[:2]
    image = torch.arange(images, device=boxes.device).to(boxes.dtype)[:, None, None].expand(-1, count, 1)
    return torch.cat([image, boxes], -1).flatten(0, 1)


def _decoded(head: nn.Module, boxes: Tensor, deltas: Tensor, border: Tensor) -> Tensor:
    """(N, K, C or 1, 4): each proposal as each class would have it."""
    coder = head.bbox_coder
    found = delta2bbox(
        boxes.flatten(0, 1),
        deltas,
        coder.means,
        coder.stds,
        add_ctr_clamp=coder.add_ctr_clamp,
        ctr_clamp=coder.ctr_clamp,
    ).reshape(*boxes.shape[:2], 1 if head.reg_class_agnostic else head.num_classes, 4)
    return torch.minimum(found.clamp(min=0), border[:, None]) if coder.clip_border else found


def _of_class(head: nn.Module, logits: Tensor, found: Tensor) -> Tensor:
    """(N, K, 4): each proposal as its best class has it."""
    if head.reg_class_agnostic:
        return found[:, :, 0]
    label = logits.split([head.num_classes, 1], -1)[0].argmax(-1).reshape(*found.shape[:2])
    return found.gather(2, label[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]


def _pooled(
    extractor: SingleRoIExtractor, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
) -> Tensor:
    """Stands in for an extractor's forward: every region is read from the level of its size."""
    if len(feats) == 1:
        return _aligned(extractor.roi_layers[0], feats[0], rois)
    levels = extractor.map_roi_levels(rois, len(feats))
    if roi_scale_factor is not None:
        rois = extractor.roi_rescale(rois, roi_scale_factor)
    count, places, found = rois.shape[0], [], []
    for level, (layer, feature) in enumerate(zip(extractor.roi_layers, feats, strict=False)):
        # how many regions a level has is known to the runtime only; the number told here stands for them while tracing
        at = _symbolic('NonZero', (levels == level,), dtype=torch.int64, shape=(1, count))
        at = _symbolic('Squeeze', (at, torch.tensor([0])), dtype=torch.int64, shape=(count,))
        chosen = _symbolic('Gather', (rois, at), attrs=dict(axis=0), dtype=rois.dtype, shape=rois.shape)
        places.append(at)
        found.append(_aligned(layer, feature, chosen))
    order = _symbolic('Concat', places, attrs=dict(axis=0), dtype=torch.int64, shape=(count,))
    regions = _symbolic('Concat', found, attrs=dict(axis=0), dtype=rois.dtype, shape=found[0].shape)
    numbers = torch.arange(count, device=rois.device)
    back = _symbolic('ScatterElements', (numbers, order, numbers), dtype=torch.int64, shape=(count,))
    return regions.index_select(0, back)


def _aligned(layer: RoIAlign, feature: Tensor, rois: Tensor) -> Tensor:
    image, boxes = rois.split([1, 4], -1)
    height, width = layer.output_size
    # of mmcv's, each that is not positive says: as many as the region is large
    ratio = max(0, int(layer.sampling_ratio))
    attributes = dict(
        mode='avg',
        output_height=height,
        output_width=width,
        sampling_ratio=ratio,
        spatial_scale=float(layer.spatial_scale),
        coordinate_transformation_mode='half_pixel' if layer.aligned else 'output_half_pixel',
    )
    number = _symbolic(
        'Squeeze', (image.to(torch.int64), torch.tensor([1])), dtype=torch.int64, shape=(image.shape[0],)
    )
    pooled = _symbolic(
        'RoiAlign',
        (feature, boxes, number),
        attrs=attributes,
        dtype=feature.dtype,
        shape=(boxes.shape[0], feature.shape[1], height, width),
    )
    if ratio or not layer.aligned:
        return pooled
    # a region without area has no value, mmcv says zero; OpenVINO divides by it
    return torch.where((boxes[:, 2:] > boxes[:, :2]).all(-1)[:, None, None, None], pooled, 0.0)


def two_stage_trouble(detector: nn.Module) -> str:
    """Why a detector with regions has no graph of its own that gives detections; '' if it has."""
    name, roi_head = type(detector).__name__, detector.roi_head
    if type(detector).predict is not TwoStageDetector.predict or not proposes(detector):
        return f'{name} predicts in a way of its own'
    rpn = detector.rpn_head
    if not ProposalDecoding.decodes(rpn):
        return f'{type(rpn).__name__} proposes in a way of its own'
    kind = CascadeRoIHead if isinstance(roi_head, CascadeRoIHead) else StandardRoIHead
    if own := _own_methods(roi_head, kind):
        return f'{type(roi_head).__name__} predicts in a way of its own ({own})'
    boxes = _each(roi_head.bbox_head)
    masks = _each(roi_head.mask_head) if roi_head.with_mask else []
    for module, known in [*((head, BBoxHead) for head in boxes), *((head, FCNMaskHead) for head in masks)]:
        if own := _own_methods(module, known):
            return f'{type(module).__name__} predicts in a way of its own ({own})'
    for head in boxes:
        if type(head.bbox_coder) is not DeltaXYWHBBoxCoder or not head.with_reg or head.custom_cls_channels:
            return f'{type(head).__name__} has boxes or scores of its own'
    for extractor in (module for module in roi_head.modules() if isinstance(module, BaseRoIExtractor)):
        plain = type(extractor).forward is SingleRoIExtractor.forward
        if not plain or any(type(x) is not RoIAlign or x.pool_mode != 'avg' for x in extractor.roi_layers):
            return f'{type(extractor).__name__} reads regions in a way of its own'
    if rpn.test_cfg and (rpn.test_cfg.get('max_per_img') or 0) > MOST_REGIONS:
        return f'`model.test_cfg.rpn.max_per_img` is {rpn.test_cfg["max_per_img"]}, and one graph holds {MOST_REGIONS}'
    if masks and roi_head.test_cfg.get('mask_thr_binary', 0) < 0:
        return '`model.test_cfg.rcnn.mask_thr_binary` below zero asks for masks that are no yes or no'
    needed = ('score_thr', 'max_per_img', *(['mask_thr_binary'] if masks else []))
    return nms_trouble(type(rpn).__name__, 'model.test_cfg.rpn', rpn.test_cfg, ('max_per_img',)) or nms_trouble(
        type(roi_head).__name__, 'model.test_cfg.rcnn', roi_head.test_cfg, needed
    )


def _each(head: nn.Module) -> list[nn.Module]:
    return list(head) if isinstance(head, nn.ModuleList) else [head]


def _own_methods(module: nn.Module, known: type) -> str:
    """The first method that a module has otherwise than the class that the graph repeats; '' if none."""
    names: Iterable[str] = _METHODS[known]
    return next((n for n in names if getattr(type(module), n, None) is not getattr(known, n)), '')
