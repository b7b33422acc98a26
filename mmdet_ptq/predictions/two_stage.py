"""Two-stage detectors: the second stage of both detectors answers for the float detector's proposals."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import torch
from mmdet.models.detectors import TridentFasterRCNN, TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mmdet_ptq.predictions.aligned import AlignedPredictions, Regions
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
    adapter (cascades, for instance) leaves only those, and the log says so. In any case all its stages answer
    for the reference's proposals and RoIs, so that their layers compute the same boxes in both detectors.
    """
    metas = [sample.metainfo for sample in batch_data_samples]
    problem = _roi_problem(model.roi_head)
    given = None if reference is None else reference.regions
    with _captured(model, given, second_stage=problem is None) as seen:
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
    second = align_rois(model.roi_head.bbox_head, *seen['box_head'], regions.rois[0], len(metas), reference)
    return replace(second, regions=regions, proposal_stage=first)


def _roi_problem(roi_head: nn.Module) -> str | None:
    """Returns why the RoI head cannot be aligned, or None."""
    for method in ('forward', '_bbox_forward'):
        if getattr(type(roi_head), method, None) is not getattr(StandardRoIHead, method):
            return f'it runs its boxes in another way than StandardRoIHead ({method})'
    box_head = roi_head.bbox_head
    if not isinstance(box_head, BBoxHead) or own_decoding(type(box_head), BBoxHead):
        return f'{type(box_head).__name__} decodes in another way than BBoxHead'
    if box_head.custom_cls_channels:
        return 'its scores come from the activation of a custom classification loss'
    return None


@contextmanager
def _captured(model: nn.Module, given: Regions | None, second_stage: bool):
    """Collects both stages' raw outputs and regions in one forward pass; feeds the given regions, if any."""
    seen: dict = {'rois': []}

    def read(_, args, kwargs):
        own = args[1] if len(args) > 1 else kwargs.pop('rois')
        seen['rois'].append(own.detach() if given is None else given.rois[len(seen['rois'])])
        return (args[0], seen['rois'][-1], *args[2:]), kwargs

    handles = []
    if model.with_rpn:
        propose = model.rpn_head.predict

        def predict(*args, **kwargs):
            own = propose(*args, **kwargs)
            seen['proposals'] = own if given is None else given.proposals
            # RoI heads take fields out of them
            return [proposals.new() for proposals in seen['proposals']]

        # called as a method, which no hook sees
        model.rpn_head.predict = predict
        handles.append(model.rpn_head.register_forward_hook(lambda _, args, out: seen.update(rpn=out)))
    for module in model.roi_head.modules():
        if isinstance(module, BaseRoIExtractor):
            handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
    if second_stage:
        handles.append(model.roi_head.bbox_head.register_forward_hook(lambda _, args, out: seen.update(box_head=out)))
    try:
        yield seen
    finally:
        if model.with_rpn:
            del model.rpn_head.predict
        for handle in handles:
            handle.remove()


def align_rois(
    box_head: nn.Module,
    cls_score: Tensor,
    bbox_pred: Tensor | None,
    rois: Tensor,
    num_images: int,
    reference: AlignedPredictions | None,
) -> AlignedPredictions:
    """Returns (N, P, ...) predictions, P the largest number of proposals of an image; the rest is padding."""
    image = rois[:, 0].long()
    counts = torch.bincount(image, minlength=num_images)
    position = torch.arange(len(rois), device=rois.device) - (counts.cumsum(0) - counts)[image]
    size = int(counts.max())

    fill = cls_score.new_zeros(num_images, size, cls_score.shape[1])
    fill[..., -1] = PADDING_LOGIT
    aligned = AlignedPredictions(
        cls_logits=fill.index_put((image, position), cls_score), activation='softmax', level_sizes=(size,)
    )
    if bbox_pred is None:
        return aligned
    # one box per proposal: the one of the class that the float detector sees there
    scores = (aligned if reference is None else reference).cls_logits.detach()
    deltas = bbox_pred.reshape(len(rois), -1, box_head.bbox_coder.encode_size)
    label = scores[image, position, :-1].argmax(-1) if deltas.shape[1] > 1 else torch.zeros_like(image)
    chosen = deltas[torch.arange(len(rois), device=rois.device), label]
    boxes = get_box_tensor(box_head.bbox_coder.decode(rois[:, 1:], chosen)).reshape(-1, 4)
    return replace(aligned, boxes=boxes.new_zeros(num_images, size, 4).index_put((image, position), boxes))
