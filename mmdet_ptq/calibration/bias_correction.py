"""Bias correction: what quantization shifts on average, the biases take back."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import AlignedPredictions, needs_reference, predict_aligned
from mmdet_ptq.progress import track
from mmdet_ptq.wrapping import Structure, quantization_mode
from mmdet_ptq.wrapping.watching.layers import add_bias, channel_axis, out_channels


@dataclass
class BiasCorrection:
    """What the correction did.

    Attributes:
        shifts: Layer to what was added to its bias, (C,).
        created: Layers that had no bias and now have one.
        skipped: Layers that were left alone, and why.
    """

    shifts: dict[str, Tensor]
    created: list[str]
    skipped: dict[str, str]


@torch.no_grad()
def correct_biases(
    detector: nn.Module,
    batches: Iterable[Any],
    structure: Structure,
    reference: nn.Module | None = None,
    exclude: Collection[str] = (),
) -> BiasCorrection:
    """Adds to every quantized layer's bias the mean of (float output - quantized output), in place.

    Empirical bias correction (Nagel et al., ICCV 2019, section 4.2 and appendix D): sequential, with everything
    before a layer quantized and already corrected. One pass per layer is not needed for that: while a batch runs,
    each layer's output is moved by the estimate so far before the next layer reads it, so one pass corrects all
    layers, up to the noise of the first batches' estimates. (Further passes do not lower it, and correcting all
    layers at once from their plain means diverges in deep detectors.) The mean is over images, positions and, for a
    head shared by several levels, over its calls.

    The layers that write class scores are best excluded: nearly all their positions are background, and setting the
    background's mean right costs the objects confidence.

    Args:
        detector: The quantized detector with its activation ranges set, in eval mode.
        batches: Calibration batches as a dataloader yields them; iterated once.
        structure: The detector's structure; learns which biases are new.
        reference: The float detector with the same folded weights (a copy of ``detector`` made before
            its biases changed; it runs in float mode). Defaults to None: ``detector`` itself in float mode, with the
            biases it has when this function is called.
        exclude: Names of layers to leave alone. Defaults to none.

    Returns:
        What was added, and to what.

    Raises:
        PTQError: No batch came.
    """
    layers = {
        layer.name: detector.get_submodule(layer.name)
        for layer in structure.layers
        if (layer.weight is not None or any(layer.inputs)) and layer.name not in exclude
    }
    created = [name for name, layer in layers.items() if layer.bias is None]
    for name in created:
        add_bias(layers[name])
    structure.biases += created
    before = {name: layer.bias.clone() for name, layer in layers.items()}
    float_detector = detector if reference is None else reference
    skipped: dict[str, str] = {}
    meters = {name: _Meter(layer) for name, layer in layers.items()}
    empty = True
    for batch in track(batches, description='correcting biases'):
        empty = False
        predictions, means = _float_means(float_detector, layers, batch)
        with _corrected(layers, meters, means), quantization_mode(detector, 'quantize'):
            _forward(detector, batch, predictions)
    if empty:
        raise PTQError('bias correction got no calibration image; raise `ptq.calibration.num_images`.')
    for name, meter in meters.items():
        meter.merge_ranks()
        if meter.uneven:
            skipped[name] = 'it sees another number of positions in the quantized detector'
        elif meter.shift is None:
            skipped[name] = 'it never ran on the calibration images'
        else:
            layers[name].bias += meter.shift.to(layers[name].bias)
    for name, reason in skipped.items():
        print_log(f'the bias of {name} is not corrected: {reason}', 'current')
    shifts = {name: layer.bias.detach() - before[name] for name, layer in layers.items() if name not in skipped}
    print_log(f'{len(shifts)} biases are corrected, {len(created)} of them new', 'current')
    return BiasCorrection(shifts, created, skipped)


class _Meter:
    """Running mean, per channel, of (float - quantized) of one layer's output before its correction."""

    def __init__(self, layer: nn.Module) -> None:
        self.axis = channel_axis(layer)
        self.uneven = False
        self.sums = layer.bias.new_zeros(out_channels(layer), dtype=torch.float64)
        self.positions = 0

    def update(self, output: Tensor, target: tuple[Tensor, int] | None) -> None:
        """Takes one call's output in; ``target`` is the float output's mean and its number of positions."""
        mean, positions = _mean(output, self.axis)
        if target is None or target[1] != positions:
            self.uneven = True
        elif positions:
            self.sums += (target[0].to(mean) - mean) * positions
            self.positions += positions

    @property
    def shift(self) -> Tensor | None:
        """The mean so far, (C,); None before the first position."""
        return self.sums / self.positions if self.positions else None

    def moved(self, output: Tensor) -> Tensor:
        """The output, corrected by the mean so far."""
        if self.shift is None:
            return output
        shape = [1] * output.ndim
        shape[self.axis] = -1
        return output + self.shift.to(output.dtype).reshape(shape)

    def merge_ranks(self) -> None:
        """Replaces this rank's sums by those of all ranks."""
        if get_world_size() > 1:
            total = torch.cat([self.sums, self.sums.new_tensor([self.positions, self.uneven])])
            all_reduce(total)
            self.sums, self.positions, self.uneven = total[:-2], int(total[-2]), bool(total[-1])


def _float_means(
    detector: nn.Module, layers: Iterable[str], batch: Any
) -> tuple[AlignedPredictions | None, dict[str, list[tuple[Tensor, int]]]]:
    """A two-stage detector's float predictions (or None), and layer to (mean per channel, positions) of every call."""
    means = defaultdict(list)

    def listen(name: str, axis: int) -> Callable:
        return lambda module, args, output: means[name].append(_mean(output, axis))

    with ExitStack() as stack:
        for name in layers:
            layer = detector.get_submodule(name)
            stack.callback(layer.register_forward_hook(listen(name, channel_axis(layer))).remove)
        stack.enter_context(quantization_mode(detector, 'float'))
        return _forward(detector, batch, None), means


@contextmanager
def _corrected(
    layers: dict[str, nn.Module], meters: dict[str, _Meter], means: dict[str, list[tuple[Tensor, int]]]
) -> Iterator[None]:
    """While a batch runs, every layer's output is measured, and corrected before the next layer reads it."""

    def listen(meter: _Meter, targets: Iterator[tuple[Tensor, int]]) -> Callable:
        def hook(module, args, output):
            meter.update(output, next(targets, None))
            return meter.moved(output)

        return hook

    with ExitStack() as stack:
        for name, meter in meters.items():
            hook = listen(meter, iter(means.get(name, ())))
            stack.callback(layers[name].register_forward_hook(hook).remove)
        yield


def _mean(output: Tensor, axis: int) -> tuple[Tensor, int]:
    rows = output.detach().movedim(axis, 0)
    return rows.mean(tuple(range(1, rows.ndim)), dtype=torch.float64), rows[0].numel()


def _forward(detector: nn.Module, batch: Any, reference: AlignedPredictions | None) -> AlignedPredictions | None:
    """Runs a batch; a two-stage detector's predictions come back, and those of the float one set its regions."""
    data = detector.data_preprocessor(copy.deepcopy(batch), False)
    if needs_reference(detector):
        return predict_aligned(detector, data['inputs'], data['data_samples'], reference).detach()
    detector(**data, mode='predict')
    return None
