"""Which outputs of a unit matter to the detector: the diagonal Fisher information of its global loss.

A few backward passes a batch give the weights of every unit at once, where BRECQ and Reg-PTQ run the whole detector for
each unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdet_ptq.calibration.fisher import noisy_loss
from mmdet_ptq.calibration.reconstruction.units import Unit
from mmdet_ptq.predictions import AlignedPredictions, predict_aligned

# draws of the noise that are averaged
DRAWS = 4


@dataclass
class FisherWeight:
    """Squared gradients at one call's output, as an outer product: positions of each image times channels.

    Attributes:
        positions: Mean over channels, (N, 1, ...), or (N, ..., 1) where channels come last.
        channels: Mean over everything else, (C,).
    """

    positions: Tensor
    channels: Tensor

    def add(self, other: FisherWeight) -> None:
        """Adds another draw's, in place."""
        self.positions += other.positions
        self.channels += other.channels


def fisher_weights(
    detector: nn.Module, units: Iterable[Unit], data: dict, reference: AlignedPredictions | None
) -> dict[tuple[str, int], FisherWeight]:
    """Measures one batch.

    Args:
        detector: The quantized detector in float mode. Where its parameters require gradients, outputs that do not
            depend on the image (of a transformer's queries) are reached, too.
        units: Its reconstruction units.
        data: A preprocessed batch: ``inputs`` and ``data_samples``.
        reference: The float predictions of a two-stage detector on the batch, else None.

    Returns:
        (unit, call) to its weight, in main memory.
    """
    outputs: dict[tuple[str, int], Tensor] = {}
    counts = Counter()

    def keep(name: str) -> Callable:
        def hook(module, args, output):
            outputs[name, counts[name]] = output
            counts[name] += 1
            # a copy goes on: what follows may write to it
            return output.clone()

        return hook

    axes = {unit.name: unit.axis for unit in units}
    handles = [detector.get_submodule(name).register_forward_hook(keep(name)) for name in axes]
    try:
        with torch.enable_grad():
            images = data['inputs'].detach().clone().requires_grad_()
            predictions = predict_aligned(detector, images, data['data_samples'], reference=reference)
            keys = list(outputs)
            weights = {key: _factors(torch.zeros_like(outputs[key]), axes[key[0]]) for key in keys}
            for draw in range(DRAWS):
                grads = torch.autograd.grad(
                    noisy_loss(predictions),
                    [outputs[key] for key in keys],
                    allow_unused=True,
                    retain_graph=draw < DRAWS - 1,
                )
                for key, grad in zip(keys, grads, strict=True):
                    if grad is not None:
                        weights[key].add(_factors(grad.square(), axes[key[0]]))
    finally:
        for handle in handles:
            handle.remove()
    return weights


def _factors(squares: Tensor, axis: int) -> FisherWeight:
    others = [other for other in range(squares.ndim) if other != axis % squares.ndim]
    return FisherWeight((squares.mean(axis, keepdim=True) / DRAWS).cpu(), (squares.mean(others) / DRAWS).cpu())
