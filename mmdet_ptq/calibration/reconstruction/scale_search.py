"""Activation scales by what they cost the unit that reads them, not by the error of the activation itself.

An error where an object is, or in a channel with large weights, costs more than one elsewhere. The weights are float
meanwhile: theirs are solved afterwards, for the scales found here. PTQ4ViT (Yuan et al., ECCV 2022) chooses scales by
their weighted output error, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmdet_ptq.calibration.reconstruction.unit_data import UnitData
from mmdet_ptq.quantizers import Quantizer
from mmdet_ptq.wrapping.weights import QuantizedWeight

# multiples of the observed scale; each quantizer's own limit, all that its observer saw, bounds them
FACTORS = (0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.35, 1.5)
# bounds the time: the unit runs on them once for every multiple
SAMPLES = 32


@torch.no_grad()
def search_scales(data: UnitData, activations: Iterable[Quantizer]) -> None:
    """Gives each activation the multiple of its scale with which the unit's output is closest to the float one.

    Args:
        data: The unit, its inputs and targets.
        activations: The quantizers to change, one after another; a scale per channel is changed as a whole.
    """
    every = -(-len(data.train_samples) // SAMPLES)
    samples = data.train_samples[::every]
    with _float_weights(data.weights.values()):
        for quantizer in activations:
            before = {key: value.clone() for key, value in quantizer.state_dict().items()}
            best, best_error = before, _error(data, samples)
            for factor in FACTORS:
                quantizer.load_state_dict(before)
                quantizer.rescale(torch.tensor(factor))
                error = _error(data, samples)
                if error < best_error:
                    best = {key: value.clone() for key, value in quantizer.state_dict().items()}
                    best_error = error
            quantizer.load_state_dict(best)


def _error(data: UnitData, samples: list[tuple]) -> Tensor:
    batches = (samples[start : start + data.batch_size] for start in range(0, len(samples), data.batch_size))
    total = torch.stack([error for batch in batches for error, _ in data.errors(batch, mix=False)]).sum()
    # no scale would be better than one that gives NaN
    return total.nan_to_num(nan=math.inf, posinf=math.inf)


@contextmanager
def _float_weights(weights: Iterable[QuantizedWeight]) -> Iterator[None]:
    before = [(weight, weight.enabled) for weight in weights]
    for weight, _ in before:
        weight.enabled = False
    try:
        yield
    finally:
        for weight, enabled in before:
            weight.enabled = enabled
