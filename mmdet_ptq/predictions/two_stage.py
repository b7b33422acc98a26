"""Detectors of two stages and cascades: what stands behind the proposals answers for the float detector's.

Masks of mmdet's own forward are those of the first hundred regions of the first image; here they are of the hundred
that the float detector is surest of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from mmdet.models.detectors import TridentFasterRCNN, TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, HybridTaskCascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_ptq.predictions.aligned import LEAST_PROBABILITY, MASKS, AlignedPredictions, Masks, Regions
from mmdet_ptq.predictions.dispatch import align_head, align_raw, announce, own_decoding
from mmdet_ptq.predictions.samples import with_annotations
from mmdet_ptq.predictions.stock import runs_as

# the background logit of padding rows: their confidence is zero, so no filter lets them pass
PADDING_LOGIT = 50.0


def is_two_stage(detector: nn.Module) -> bool:
    """Returns whether the detector runs its stages as ``TwoStageDetector`` does."""
    if isinstance(detector, TridentFasterRCNN) and detector.test_branch_idx != -1:
        return True  # of its branches it predicts with one
    return runs_as(detector, TwoStageDetector)


def predict_two_stage(
    detector: nn.Module,
    model: nn.Module,
    batch_inputs: Tensor,
    batch_data_samples: list,
    reference: AlignedPredictions | None,
) -> AlignedPredictions:
    """Runs the whole detector once and aligns both stages; see :func:`predict_aligned`.

    The region proposal network's predictions are the result's ``proposal_stage``. A RoI head without an
    adapter leaves only those, and the log says so. In any case all its stages answer
    for the reference's proposals and RoIs, so that their layers compute the same boxes in both detectors.
    """
    metas = [sample.metainfo for sample in batch_data_samples]
    problem = roi_problem(model.roi_head)
    given = None if reference is None else reference.regions
    heads = [] if problem is not None else _box_heads(model.roi_head)
    masked = bool(heads) and _compares_masks(model.roi_head)
    with _captured(model, given, heads, masked, tuple(metas[0]['img_shape'][:2])) as seen:
        outputs = detector(batch_inputs, with_annotations(batch_data_samples), mode='tensor')
    regions = Regions(seen.get('proposals'), seen['rois'])
    first = align_head(model.rpn_head, seen['rpn'], metas) if 'rpn' in seen else None
    if model.with_rpn and first is None:
        announce(
            f'{type(model.rpn_head).__name__} proposes without calling its own forward, so only the second stage '
            'enters the global loss.'
        )
    if problem is not None and first is None:
        return replace(align_raw(model.roi_head, outputs, problem), regions=regions)
    if problem is not None:
        announce(
            f'{type(model.roi_head).__name__}: {problem}, so only the boxes of the region proposal network '
            'enter the global loss.'
        )
        return replace(first, regions=regions)
    # of a cascade the mean score counts, and the last stage's box
    scores = torch.stack([cls_score for cls_score, _, _ in seen['boxes']]).mean(0)
    _, deltas, rois = seen['boxes'][-1]
    second = align_rois(heads[-1], scores, deltas, rois, len(metas), reference)
    if masked:
        rows = seen['mask_rows'] if reference is None else reference.masks.rows
        sure = (second if reference is None else reference).cls_logits.detach()
        second.masks = _rows_masks(_mean_of_stages(seen['masks']), rows, sure)
    return replace(second, regions=regions, proposal_stage=first)


def roi_problem(roi_head: nn.Module) -> str | None:
    """Returns why the RoI head cannot be aligned, or None."""
    cascade = isinstance(roi_head, CascadeRoIHead)
    htc = isinstance(roi_head, HybridTaskCascadeRoIHead)
    kind = HybridTaskCascadeRoIHead if htc else CascadeRoIHead if cascade else StandardRoIHead
    for method in ('forward', '_bbox_forward', *(['_refine_roi'] if cascade else [])):
        if getattr(type(roi_head), method, None) is not getattr(kind, method):
            return f'it runs its boxes in another way than {kind.__name__} ({method})'
    for box_head in _box_heads(roi_head):
        if not isinstance(box_head, BBoxHead) or own_decoding(type(box_head), BBoxHead):
            return f'{type(box_head).__name__} decodes in another way than BBoxHead'
        if box_head.custom_cls_channels:
            return 'its scores come from the activation of a custom classification loss'
    return None


def _box_heads(roi_head: nn.Module) -> list[nn.Module]:
    """The box head, or one for each stage of a cascade."""
    return list(roi_head.bbox_head) if isinstance(roi_head, CascadeRoIHead) else [roi_head.bbox_head]


def _compares_masks(roi_head: nn.Module) -> bool:
    """Whether masks enter the global loss; the log says why they do not."""
    if not roi_head.with_mask:
        return False
    name = type(roi_head).__name__
    kinds = (StandardRoIHead, CascadeRoIHead, HybridTaskCascadeRoIHead)
    known = any(type(roi_head)._mask_forward is kind._mask_forward for kind in kinds) and all(
        isinstance(head, FCNMaskHead) and not own_decoding(type(head), FCNMaskHead) for head in _mask_heads(roi_head)
    )
    if not known:
        announce(f'{name}: its masks are drawn in another way than by FCNMaskHead, so the global loss has only boxes.')
        return False
    return True


def _mask_heads(roi_head: nn.Module) -> list[nn.Module]:
    """The mask head, or one for each stage of a cascade."""
    return list(roi_head.mask_head) if isinstance(roi_head, CascadeRoIHead) else [roi_head.mask_head]


@contextmanager
def _captured(model: nn.Module, given: Regions | None, heads: list[nn.Module], masked: bool, size: tuple[int, int]):
    """Collects both stages' raw outputs and regions in one forward pass; feeds the given regions, if any."""
    seen: dict = {'rois': [], 'boxes': [], 'masks': []}
    cascade = isinstance(model.roi_head, CascadeRoIHead)

    def read(_, args, kwargs):
        own = args[1] if len(args) > 1 else kwargs.pop('rois')
        if given is not None:
            own = given.rois[len(seen['rois'])]
        elif masked and seen['boxes'] and not cascade:
            seen['mask_rows'], own = _surest(seen['boxes'], len(own))
        seen['rois'].append(own.detach())
        return (args[0], seen['rois'][-1], *args[2:]), kwargs

    handles = []
    if model.with_rpn:
        propose = model.rpn_head.predict

        def predict(*args, **kwargs):
            own = propose(*args, **kwargs)
            seen['proposals'] = _at_least_one(own, size) if given is None else given.proposals
            # RoI heads take fields out of them
            return [proposals.new() for proposals in seen['proposals']]

        # called as a method, which no hook sees
        model.rpn_head.predict = predict
        handles.append(model.rpn_head.register_forward_hook(lambda _, args, out: seen.update(rpn=out)))
    for module in model.roi_head.modules():
        if isinstance(module, BaseRoIExtractor):
            handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
    for head in heads:
        handles.append(head.register_forward_hook(lambda _, args, out: seen['boxes'].append((*out, seen['rois'][-1]))))
    if masked and cascade:
        # mmdet draws those of all proposals, and cuts them from the graph
        model.roi_head._mask_forward = partial(_draw_surest, model.roi_head._mask_forward, seen)
    elif masked:
        handles.append(model.roi_head.mask_head.register_forward_hook(lambda _, args, out: seen['masks'].append(out)))
    try:
        yield seen
    finally:
        if model.with_rpn:
            del model.rpn_head.predict
        if masked and cascade:
            del model.roi_head._mask_forward
        for handle in handles:
            handle.remove()


def _at_least_one(proposals: list[InstanceData], size: tuple[int, int]) -> list[InstanceData]:
    """The first image as a region of its own where nothing is proposed at all: mmdet's cascades need one."""
    if any(map(len, proposals)):
        return proposals
    height, width = size
    boxes = proposals[0].bboxes.new_tensor([[0, 0, width, height]])
    whole = InstanceData(bboxes=boxes, scores=boxes.new_ones(1), labels=boxes.new_zeros(1, dtype=torch.long))
    return [whole, *proposals[1:]]


def _draw_surest(draw: Callable, seen: dict, *args, **kwargs) -> dict:
    """Stands in for a cascade's ``_mask_forward``: the surest RoIs' masks are seen, all get the first one's."""
    given = inspect.signature(draw).bind(*args, **kwargs)
    rois = given.arguments['rois']
    seen['mask_rows'], given.arguments['rois'] = _surest(seen['boxes'], min(MASKS, len(rois)))
    found = draw(*given.args, **given.kwargs)['mask_preds']
    stages = found if isinstance(found, list) else [found]
    seen['masks'] += stages
    like = [stage.detach()[:1].expand(len(rois), *stage.shape[1:]) for stage in stages]
    return dict(mask_preds=like if isinstance(found, list) else like[0])


def _mean_of_stages(masks: list[Tensor]) -> Tensor:
    """Logits of what mmdet makes of the masks of a cascade's stages: their mean probability."""
    if len(masks) == 1:
        return masks[0]
    wide = torch.promote_types(masks[0].dtype, torch.float32)
    return torch.stack(masks).to(wide).sigmoid().mean(0).logit(eps=LEAST_PROBABILITY)


def _surest(boxes: list[tuple], number: int) -> tuple[Tensor, Tensor]:
    """The RoIs of the highest scores, image by image: their rows (number, 2), and they themselves.

    Args:
        boxes: Scores, deltas and RoIs of each stage.
        number: How many.
    """
    # none of it is an operation of the detector's own
    with torch._C.DisableTorchFunction():
        rois = boxes[-1][2]
        confidence = torch.stack([scores for scores, _, _ in boxes]).mean(0).softmax(-1)[:, :-1].amax(-1)
        index = confidence.topk(number).indices.sort().values
        return torch.stack(_places(rois), 1)[index], rois[index]


def _places(rois: Tensor) -> tuple[Tensor, Tensor]:
    """Image of each RoI, and the RoI's position among those of its image."""
    image = rois[:, 0].long()
    counts = torch.bincount(image)
    return image, torch.arange(len(rois), device=rois.device) - (counts.cumsum(0) - counts)[image]


def _rows_masks(masks: Tensor, rows: Tensor, cls_logits: Tensor) -> Masks:
    """Masks of the class that the float detector sees in each RoI.

    Args:
        masks: (M, C or 1, H, W) logits.
        rows: (M, 2) image and position of each RoI.
        cls_logits: (N, P, C + 1) of the float detector.
    """
    label = cls_logits[rows[:, 0], rows[:, 1], :-1].argmax(-1)
    own = masks[torch.arange(len(masks), device=masks.device), label if masks.shape[1] > 1 else 0]

    def draw(asked: Tensor) -> Tensor:
        same = (asked[:, None] == rows).all(-1)
        return own[same.int().argmax(1)]

    return Masks(draw, rows)


def align_rois(
    box_head: nn.Module,
    cls_score: Tensor,
    bbox_pred: Tensor | None,
    rois: Tensor,
    num_images: int,
    reference: AlignedPredictions | None,
) -> AlignedPredictions:
    """Returns (N, P, ...) predictions, P the largest number of proposals of an image; the rest is padding."""
    image, position = _places(rois)
    size = int(torch.bincount(image, minlength=num_images).max())

    fill = cls_score.new_zeros(num_images, size, cls_score.shape[1])
    fill[..., -1] = PADDING_LOGIT
    aligned = AlignedPredictions(
        cls_logits=fill.index_put((image, position), cls_score), activation='softmax', level_sizes=(size,)
    )
    if bbox_pred is None:
        return aligned
    # one box per proposal: the one of the class that the float detector sees there
    scores = (aligned if reference is None else reference).cls_logits.detach()
    deltas = bbox_pred.unflatten(1, (-1, box_head.bbox_coder.encode_size))
    label = scores[image, position, :-1].argmax(-1) if deltas.shape[1] > 1 else torch.zeros_like(image)
    chosen = deltas[torch.arange(len(rois), device=rois.device), label]
    boxes = get_box_tensor(box_head.bbox_coder.decode(rois[:, 1:], chosen)).reshape(-1, 4)
    return replace(aligned, boxes=boxes.new_zeros(num_images, size, 4).index_put((image, position), boxes))
