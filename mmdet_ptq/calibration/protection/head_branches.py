"""Which part of the detector a layer call belongs to, read from the autograd graph and not from names."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.predictions import AlignedPredictions, predict_aligned
from mmdet_ptq.wrapping import Structure, quantization_mode
from mmdet_ptq.wrapping.watching.probe import head_names

CLASS, BOX, QUALITY, SHARED = 'class branch', 'box branch', 'quality branch', 'shared head layers'
OTHER = 'other head layers'
OUTPUTS = 'outputs'


@dataclass(frozen=True)
class Place:
    """Where one call of a layer stands.

    Attributes:
        part: ``'backbone'``, ``'neck'``, ...; in a head the branch: the class scores depend on it, the boxes, only the
            quality (objectness, centerness), several of these, or nothing of the kind.
        level: The one level of priors that depends on the call; None where several do.
        output: Whether no other layer reads what the call computes.
    """

    part: str
    level: int | None = None
    output: bool = False


def find_places(detector: nn.Module, structure: Structure, batch: dict[str, Any]) -> dict[tuple[str, int], Place]:
    """Places of all layer calls, from gradients of the aligned predictions with respect to every call's output.

    Args:
        detector: The quantized detector; it runs in float mode.
        structure: Its structure.
        batch: One batch as a dataloader yields it; one image is enough.

    Returns:
        (layer, index of the call) to place. Where the head has no adapter its layers are all ``'other head layers'``.
    """
    layers = [layer for layer in structure.layers if layer.inputs]
    parts = {layer.name: layer.part for layer in layers}
    calls, outputs, inputs, predictions = _run(detector, list(parts), batch)
    stages = [stage for stage in (predictions, predictions.proposal_stage) if stage is not None]
    reached = {
        CLASS: _depends([s.cls_logits for s in stages], outputs),
        BOX: _depends([t for s in stages for t in (s.boxes, s.distributions)], outputs),
        QUALITY: _depends([s.quality_logits for s in stages], outputs),
    }
    levels = _levels(stages, outputs)
    feeds = _depends(inputs, outputs)
    heads = head_names(detector)
    places = {}
    for i, call in enumerate(calls):
        part = parts[call[0]]
        if part in heads:
            # a box or class layer that also feeds the quality is still that branch's layer
            branches = [b for b in (CLASS, BOX) if reached[b][i]] or [b for b in (QUALITY,) if reached[b][i]]
            branch = OTHER if not branches else branches[0] if len(branches) == 1 else SHARED
            part = branch if len(heads) == 1 else f'{part} {branch}'
        mine = [level for level, hit in enumerate(levels) if hit[i]]
        places[call] = Place(part, mine[0] if len(mine) == 1 and len(levels) > 1 else None, not feeds[i])
    return places


def _run(
    detector: nn.Module, layers: list[str], batch: dict[str, Any]
) -> tuple[list[tuple[str, int]], list[Tensor], list[Tensor], AlignedPredictions]:
    """One float forward with gradients: every layer call with its output, all inputs, the predictions."""
    calls, outputs, inputs, counts, handles = [], [], [], defaultdict(int), []

    def listen(name: str):
        def hook(module, args, kwargs, output):
            calls.append((name, counts[name]))
            counts[name] += 1
            outputs.append(output)
            inputs.extend(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad)

        return hook

    with torch.enable_grad(), quantization_mode(detector, 'float'):
        data = detector.data_preprocessor(copy.deepcopy(batch), False)
        image = data['inputs'].detach().requires_grad_()
        for name in layers:
            handles.append(detector.get_submodule(name).register_forward_hook(listen(name), with_kwargs=True))
        try:
            # without a reference: a two-stage detector makes its own proposals
            predictions = predict_aligned(detector, image, data['data_samples'])
        finally:
            for handle in handles:
                handle.remove()
    return calls, outputs, inputs, predictions


def _depends(targets: list[Tensor | None], outputs: list[Tensor]) -> list[bool]:
    """Which of the outputs any of the targets is computed from."""
    # weighted: in a plain sum, the corners of a box cancel its width
    roots = [
        (t * torch.linspace(1, 2, t.shape[-1], device=t.device)).sum()
        for t in targets
        if t is not None and t.requires_grad
    ]
    tracked = [i for i, output in enumerate(outputs) if output.requires_grad]
    found = [False] * len(outputs)
    if roots and tracked:
        gradients = torch.autograd.grad(roots, [outputs[i] for i in tracked], retain_graph=True, allow_unused=True)
        for i, gradient in zip(tracked, gradients, strict=True):
            # a piece of a concatenation sends zeros to what the other pieces were made of
            found[i] = gradient is not None and bool(gradient.any())
    return found


def _levels(stages: list[AlignedPredictions], outputs: list[Tensor]) -> list[list[bool]]:
    """For each level of priors, which outputs its predictions are computed from."""
    stage = next((s for s in stages if len(s.level_sizes) > 1), None)
    if stage is None:
        return []
    targets = [t for t in (stage.cls_logits, stage.boxes, stage.quality_logits, stage.distributions) if t is not None]
    return [
        _depends([t.split(stage.level_sizes, 1)[level] for t in targets], outputs)
        for level in range(len(stage.level_sizes))
    ]
