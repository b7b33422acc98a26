"""What quantizing some tensors does to the detections: box IoU, scores and the filtered global loss."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ptq.calibration.global_loss import FilteredGlobalLoss, box_iou
from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import write_json
from mmdet_ptq.predictions import AlignedPredictions, predict_aligned
from mmdet_ptq.version import STATE_FORMAT
from mmdet_ptq.wrapping import Structure, quantization_mode
from mmdet_ptq.wrapping.inputs import QuantizedInput, divisions_of
from mmdet_ptq.wrapping.state import STATE, quantize_only, with_input

# a prior this confident may be reported as a detection
SCORE_THR = 0.05
# stands for a loss that is not finite, so that it can be compared and written
WORST = 1e9


@dataclass(frozen=True)
class Damage:
    """How far the predictions moved from the float detector's.

    Attributes:
        loss: Filtered global loss (Reg-PTQ, CVPR 2024), all terms; zero where nothing moved.
        iou_loss: 1 - mean IoU of the float and the quantized box of the same prior, weighted by the float
            confidence, over priors of at least ``SCORE_THR``; None without boxes or without such priors.
        score_change: Sum of the absolute changes of confidence over the sum of the float confidences, over priors that
            either detector gives at least ``SCORE_THR``; None where the head has no scores or no prior passes.
        output_error: Energy of the error over the energy of the signal, at the outputs of the layers that read the
            tensor, with this tensor alone quantized; None where it was not asked for or no layer reads the tensor.
    """

    loss: float
    iou_loss: float | None = None
    score_change: float | None = None
    output_error: float | None = None


class DamageStore:
    """Finished measurements in a JSON file, so that an interrupted analysis goes on where it stopped.

    Args:
        path: The file.
        fingerprint: Hash of all that the figures depend on; a file with another one is not used.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = Path(path), fingerprint
        self.values: dict[str, Damage] = {}
        if self.path.is_file():
            self._take_over()

    def _take_over(self) -> None:
        try:
            stored = json.loads(self.path.read_text())
            same = stored['fingerprint'] == self.fingerprint
            values = {key: Damage(**value) for key, value in stored['damage'].items()} if same else {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print_log(
                f'{self.path} cannot be used ({type(error).__name__}: {error}); everything is measured again',
                'current',
                level=logging.WARNING,
            )
            return
        if same:
            print_log(f'{len(values)} measurements are taken over from {self.path}', 'current')
        else:
            print_log(
                f'{self.path} belongs to another detector, config or images; everything is measured again', 'current'
            )
        self.values = values

    def put(self, key: str, damage: Damage) -> None:
        """Keeps one measurement, on disk too."""
        self.values[key] = damage
        if is_main_process():
            write_json(
                self.path,
                dict(fingerprint=self.fingerprint, damage={key: asdict(value) for key, value in self.values.items()}),
            )


class DamageMeter:
    """Measures on a few calibration images what quantizing chosen tensors does to the predictions.

    The float predictions are those of the wrapped detector itself in float mode, so a tensor without error has a loss
    of exactly zero; measure before biases or weights are trained. On several ranks every rank measures the same images
    and so comes to the same figures.

    Args:
        detector: The observed quantized detector, in eval mode.
        structure: Its structure.
        batches: A few calibration batches as a dataloader yields them, the same on every rank.
        resume_file: Where finished measurements are kept. Defaults to None, which keeps none.

    Raises:
        PTQError: There is no image.
    """

    def __init__(
        self,
        detector: nn.Module,
        structure: Structure,
        batches: Sequence[dict[str, Any]],
        resume_file: Path | None = None,
    ) -> None:
        self.detector, self.structure = detector, structure
        # no IoU filter: it would leave out the boxes that a format destroys, and formats are compared on the same
        # boxes. GIoU is bounded where the distance of two decoded boxes is not
        self.loss = FilteredGlobalLoss(GlobalLossConfig(iou_thr=0.0, box_loss='giou'))
        self.images: list[tuple[dict, AlignedPredictions]] = []
        with torch.no_grad(), quantization_mode(detector, 'float'):
            for batch in batches:
                data = detector.data_preprocessor(copy.deepcopy(batch), False)
                reference = predict_aligned(detector, data['inputs'], data['data_samples']).detach()
                self.images.append((data, reference.with_finite_boxes()))
        if not self.images:
            raise PTQError('sensitivity needs at least one calibration image; check `ptq.calibration`.')
        self.store = None if resume_file is None else DamageStore(resume_file, self.fingerprint())

    @property
    def num_images(self) -> int:
        """Number of images that are measured on."""
        return sum(len(data['data_samples']) for data, _ in self.images)

    def run_one(self) -> None:
        """Runs the detector on one image with ``mode='predict'``."""
        data, _ = self.images[0]
        self.detector(data['inputs'][:1], copy.deepcopy(data['data_samples'][:1]), mode='predict')

    def fingerprint(self) -> str:
        """Hash of the detector's numbers, its structure, the images and the format of the state."""
        told = json.dumps([STATE_FORMAT, self.structure.to_dict()], sort_keys=True, default=str)
        digest = hashlib.sha256(told.encode())
        tensors = [*self.detector.state_dict().values(), *(data['inputs'] for data, _ in self.images)]
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def measure(
        self, activations: Collection[str], weights: Collection[str], key: str | None = None, layers: Sequence[str] = ()
    ) -> Damage:
        """Quantizes the named tensors and nothing else, and compares with the float predictions.

        Args:
            activations: Activation names.
            weights: Names of the layers whose weight is quantized.
            key: Name under which the figures are kept in the resume file; equal keys must mean equal measurements.
            layers: Layers whose own output error is measured too. Defaults to none.
        """
        known = None if self.store is None else self.store.values.get(key)
        if known is not None and (known.output_error is not None or not layers):
            return known
        parts, errors = [], OutputError(self.detector, layers, weights)
        with torch.no_grad(), errors.listening(), quantize_only(self.detector, activations, weights):
            for data, reference in self.images:
                student = predict_aligned(self.detector, data['inputs'], data['data_samples'], reference)
                parts.append((len(data['data_samples']), *self._compare(student.with_finite_boxes(), reference)))
        damage = _joined(parts, errors.ratio if layers else None)
        if self.store is not None and key is not None:
            self.store.put(key, damage)
        return damage

    def measure_all(self) -> Damage:
        """The whole quantized detector."""
        return self.measure(self.structure.activations, [x.name for x in self.structure.layers if x.weight])

    @torch.no_grad()
    def output_errors(self) -> dict[str, float]:
        """The output errors of all activations that layers read, each alone and quantized where it is read.

        Layers find an activation that is quantized where it is computed quantized already, so that they know no float
        value to compare with. In front of an activation that is quantized alone all is float, so one pass serves all.
        """
        state, sums = getattr(self.detector, STATE), defaultdict(lambda: [0.0, 0.0])

        def listen(own: QuantizedInput) -> Callable:
            def hook(module, args, kwargs, output):
                name = own.names[(own.calls - 1) % len(own.names)]
                if name is not None:
                    args, kwargs = with_input(args, kwargs, state.activations[name])
                    sums[name][0] += float((module.forward(*args, **kwargs).double() - output).square().sum())
                    sums[name][1] += float(output.double().square().sum())

            return hook

        with ExitStack() as stack:
            for own in state.hooks:
                if isinstance(own, QuantizedInput):
                    layer = self.detector.get_submodule(own.layer)
                    stack.callback(layer.register_forward_hook(listen(own), with_kwargs=True).remove)
            stack.enter_context(quantization_mode(self.detector, 'float'))
            for data, reference in self.images:
                predict_aligned(self.detector, data['inputs'], data['data_samples'], reference)
        return {name: _ratio(error, signal) for name, (error, signal) in sums.items()}

    def _compare(self, student: AlignedPredictions, reference: AlignedPredictions) -> tuple[float, Tensor]:
        """Loss, and the sums that the IoU and the score change are ratios of."""
        terms = self.loss(student, reference)
        loss = float(sum(value for name, value in terms.items() if name.startswith('loss_')))
        sums = torch.zeros(4, dtype=torch.float64)
        if reference.raw is None:
            before, after = reference.confidence().double(), student.confidence().double()
            keep = (before >= SCORE_THR) | (after >= SCORE_THR)
            sums[:2] = torch.stack([(after - before).abs()[keep].sum(), before[keep].sum()])
            if reference.boxes is not None:
                size = reference.boxes[..., 2:] - reference.boxes[..., :2]
                keep = (before >= SCORE_THR) & (size > 0).all(-1)  # a box without an area overlaps nothing
                overlap = box_iou(reference.boxes[keep], student.boxes[keep])
                sums[2:] = torch.stack([(before[keep] * (1 - overlap)).sum(), before[keep].sum()])
        return loss, sums


def _joined(parts: list[tuple[int, float, Tensor]], output_error: float | None) -> Damage:
    count = sum(images for images, _, _ in parts)
    loss = sum(images * value for images, value, _ in parts) / count
    change, scores, overlap, weight = sum(sums for _, _, sums in parts).tolist()
    return Damage(
        _finite(loss),
        _finite(overlap / weight) if weight else None,
        _finite(change / scores) if scores else None,
        output_error,
    )


def _ratio(error: float, signal: float) -> float:
    return _finite(error / signal) if signal else 0.0


def _finite(value: float) -> float:
    return min(value, WORST) if math.isfinite(value) else WORST


class OutputError:
    """Runs some layers a second time on their float tensors and sums the squared differences of the outputs."""

    def __init__(self, detector: nn.Module, layers: Sequence[str], weights: Collection[str]) -> None:
        self.modules = {name: detector.get_submodule(name) for name in layers}
        self.divisions = divisions_of(getattr(detector, STATE), layers)
        self.weights = set(weights)
        self.error = self.signal = 0.0
        self._inputs: dict[str, tuple] = {}

    @property
    def ratio(self) -> float:
        return _ratio(self.error, self.signal)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens at the layers while a block of code runs."""
        handles = []
        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(self._after(name), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str):
        def hook(module, args, kwargs):
            self._inputs[name] = args, kwargs

        return hook

    def _after(self, name: str):
        def hook(module, args, kwargs, output):
            before, before_kwargs = self._inputs.pop(name)
            same = [*args, *kwargs.values()], [*before, *before_kwargs.values()]
            if name not in self.weights and all(a is b for a, b in zip(*same, strict=True)):
                return  # another call of a shared layer: the tensor in question is not its input
            with _float_weight(module, name in self.weights):
                if name in self.divisions:
                    before, before_kwargs = with_input(before, before_kwargs, self.divisions[name])
                reference = module.forward(*before, **before_kwargs).double()
            self.error += float((output.double() - reference).square().sum())
            self.signal += float(reference.square().sum())

        return hook


@contextmanager
def _float_weight(module: nn.Module, quantized: bool) -> Iterator[None]:
    switches = [p for p in module.parametrizations.weight if hasattr(p, 'enabled')] if quantized else []
    for switch in switches:
        switch.enabled = False
    try:
        yield
    finally:
        for switch in switches:
            switch.enabled = True
