"""How far the quantized detector moves from the float one: layer by layer, and in its scores and boxes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.calibration.global_loss import box_iou
from mmdet_ptq.predictions import AlignedPredictions, predict_aligned
from mmdet_ptq.wrapping import quantization_mode
from mmdet_ptq.wrapping.watching.layers import QUANTIZABLE, channel_axis

# positions of a layer's output that are kept per call: bounds memory, and is plenty for a ratio of energies
MAX_POSITIONS = 1024
SCORE_THR = 0.05


@dataclass
class LayerError:
    """Error of one layer's output, with everything before it quantized too.

    Attributes:
        layer: Path in the detector.
        part: The detector's child it belongs to.
        sqnr_db: Signal to quantization noise ratio in decibels; infinite where nothing changed.
        mean_shift_share: Share of the error's energy that is a constant shift per channel, which a bias could
            take back, 0..1; None where there are too few positions to tell.
    """

    layer: str
    part: str
    sqnr_db: float
    mean_shift_share: float | None


@dataclass
class ScoreDrift:
    """Confidence and box of the same priors in both detectors, where either is confident.

    Attributes:
        float_scores: Confidences of the float detector, (K,).
        quantized_scores: Confidences of the quantized detector, (K,).
        ious: IoU of the two boxes, (K,); empty for heads without boxes.
        reason: Why there is nothing to compare; empty otherwise.
    """

    float_scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    quantized_scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    ious: Tensor = field(default_factory=lambda: torch.zeros(0))
    reason: str = ''

    @property
    def mean_drift(self) -> float:
        """Mean absolute change of the confidence."""
        return (self.quantized_scores - self.float_scores).abs().mean().item()

    @property
    def mean_shift(self) -> float:
        """Mean signed change of the confidence; negative where quantization loses confidence."""
        return (self.quantized_scores - self.float_scores).mean().item()


def layer_errors(
    float_detector: nn.Module, detector: nn.Module, batch: dict[str, Any], folds: Sequence[Sequence[str]] = ()
) -> list[LayerError]:
    """Compares every layer's output in the float and in the quantized detector on one batch.

    Args:
        float_detector: The float detector, or a wrapped one that is run in float mode (``detector`` itself
            will do as long as its biases are the float ones).
        detector: The quantized detector.
        batch: One batch as a dataloader yields it.
        folds: (convolution, normalisation) pairs that are folded in ``detector``: the folded convolution is
            compared with the float normalisation's output. Defaults to none.

    Returns:
        One entry per layer that ran, in the order in which they ran. A second stage that sees other proposals
        in the two detectors is left out, its outputs do not pair.
    """
    norm_of = dict(folds)
    layers = [name for name, module in detector.named_modules() if isinstance(module, QUANTIZABLE)]
    axes = {name: channel_axis(detector.get_submodule(name)) for name in layers}
    with _recorded(float_detector, {norm_of.get(name, name): name for name in layers}, axes) as before:
        reference = predict(float_detector, batch, 'float')
    with _recorded(detector, {name: name for name in layers}, axes) as after:
        predict(detector, batch, 'quantize', reference)
    unpaired = reference.regions is None
    errors = []
    for name, outputs in after.items():
        part = name.split('.')[0]
        if part == 'roi_head' and unpaired or [t.shape for t in before.get(name, [])] != [t.shape for t in outputs]:
            continue
        errors.append(LayerError(name, part, *compare_outputs(torch.cat(before[name], 1), torch.cat(outputs, 1))))
    return errors


def compare_outputs(signal: Tensor, quantized: Tensor) -> tuple[float, float | None]:
    """SQNR in decibels and the share of constant shifts in the error; outputs are (channels, positions)."""
    error = quantized - signal
    noise = error.square().sum().item()
    if noise == 0:
        return math.inf, None
    sqnr = 10 * math.log10(max(signal.square().sum().item(), 1e-30) / noise)
    count = error.shape[1]
    if count < 8:
        return sqnr, None
    # the squared mean of a sample overestimates the squared mean by variance / count
    shift = error.mean(1).square() - error.var(1) / count
    return sqnr, min(1.0, max(0.0, shift.sum().item() * count / noise))


@contextmanager
def _recorded(detector: nn.Module, names: dict[str, str], axes: dict[str, int]) -> Iterator[dict[str, list[Tensor]]]:
    """Collects outputs as (channels, positions), one per call; the same positions for the same shape.

    Args:
        detector: Where to listen.
        names: Module to the name under which its output is kept.
        axes: Name to the axis that holds the channels.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def listen(name: str):
        def hook(_, args, output):
            rows = output.detach().movedim(axes[name], 0).flatten(1)
            if rows.shape[1] > MAX_POSITIONS:
                generator = torch.Generator().manual_seed(0)
                chosen = torch.randint(rows.shape[1], (MAX_POSITIONS,), generator=generator)
                rows = rows[:, chosen.to(rows.device)]
            seen[name].append(rows.double())

        return hook

    with ExitStack() as stack:
        for module, name in names.items():
            handle = detector.get_submodule(module).register_forward_hook(listen(name))
            stack.callback(handle.remove)
        yield seen


@torch.no_grad()
def predict(
    detector: nn.Module, batch: dict[str, Any], mode: str, reference: AlignedPredictions | None = None
) -> AlignedPredictions:
    """Aligned predictions of one batch in a quantization mode.

    Args:
        detector: Float or quantized detector.
        batch: One batch as a dataloader yields it.
        mode: ``'float'`` or ``'quantize'``; a detector that is not wrapped ignores it.
        reference: The float detector's predictions, which two-stage detectors pair with. Defaults to None.
    """
    data = detector.data_preprocessor(batch, False)
    with quantization_mode(detector, mode):
        return predict_aligned(detector, data['inputs'], data['data_samples'], reference).detach()


def score_drift(
    float_detector: nn.Module, detector: nn.Module, batches: Sequence[dict[str, Any]], score_thr: float = SCORE_THR
) -> ScoreDrift:
    """Pairs the predictions of both detectors prior by prior, before NMS.

    Args:
        float_detector: As for :func:`layer_errors`.
        detector: The quantized detector.
        batches: A few batches as a dataloader yields them.
        score_thr: A prior counts when either detector is at least this confident. Defaults to 0.05.
    """
    scores, ious = [], []
    for batch in batches:
        before = predict(float_detector, batch, 'float')
        if before.raw is not None:
            return ScoreDrift(reason='the head has no adapter, so its raw outputs do not tell scores and boxes apart')
        after = predict(detector, batch, 'quantize', before)
        pair = torch.stack([before.confidence(), after.confidence()])
        keep = (pair >= score_thr).any(0)
        scores.append(pair[:, keep].cpu())
        if before.boxes is not None:
            ious.append(box_iou(before.boxes[keep], after.boxes[keep]).cpu())
    if not scores:
        return ScoreDrift(reason='there were no images to predict on')
    before, after = torch.cat(scores, 1)
    if len(before) == 0:
        return ScoreDrift(reason=f'neither detector is more than {score_thr} confident of any box in these images')
    return ScoreDrift(before, after, torch.cat(ious) if ious else torch.zeros(0))
