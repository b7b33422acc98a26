"""Biases on the grid of the int32 accumulator that integer kernels add them to."""
from __future__ import annotations

import torch
from torch import nn

from ..wrapping import Structure, float_weight, quantized_weights
from ..wrapping.inputs import STATE
from .integer_weights import integer_weight

_INT32 = 2**31 - 1


@torch.no_grad()
def settle_biases(detector: nn.Module, structure: Structure) -> list[str]:
    """Rounds biases, in place, to multiples of input scale x weight scale.

    What is simulated is then what an integer kernel adds. The bias of a layer whose calls read tensors of different
    scales (a head shared by several levels) lies on several grids and stays as it is; export rounds it call by call.

    Args:
        detector: The calibrated quantized detector.
        structure: Its structure.

    Returns:
        Names of the layers whose bias was rounded.
    """
    activations, weights = getattr(detector, STATE).activations, quantized_weights(detector)
    settled = []
    for layer in structure.layers:
        module = detector.get_submodule(layer.name)
        if not layer.integer or module.bias is None or len(set(layer.inputs)) > 1:
            continue
        quantized, source = weights[layer.name], activations[layer.inputs[0]]
        weight = integer_weight(quantized.quantizer, quantized.codes(float_weight(module)))
        step = (source.positive_scale() * weight.scale).to(module.bias)
        codes = (module.bias / step).round_()
        if codes.abs().max() <= _INT32:
            module.bias.copy_(codes * step)
            settled.append(layer.name)
    return settled
