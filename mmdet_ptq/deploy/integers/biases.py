"""Biases on the grid of the int32 accumulator that integer kernels add them to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmdet_ptq.deploy.integers.weights import integer_scale, integer_weight
from mmdet_ptq.quantizers import AffineQuantizer, Quantizer
from mmdet_ptq.wrapping import QuantizedWeight, Structure, float_weight, quantized_weights
from mmdet_ptq.wrapping.state import STATE, QuantizationState
from mmdet_ptq.wrapping.watching.layers import is_transposed

_INT32 = 2**31 - 1
# what a bias may take of it: the sums it is added to need room, too
_ROOM = 2**30


@torch.no_grad()
def settle_biases(detector: nn.Module, structure: Structure) -> list[str]:
    """Rounds biases to multiples of input scale x weight scale.

    What is simulated is then what an integer kernel adds. A bias is rounded in place, unless the calls of its layer
    read tensors of different scales (a head shared by several levels): it then lies on several grids, see
    :func:`round_shared_biases`.

    Trained detectors have dead channels, with a bias and weights so small that in their units no int32 holds the
    bias. There the weight's scale is raised until one does; half a step of such weights is a fraction of a code behind.

    Args:
        detector: The calibrated quantized detector.
        structure: Its structure.

    Returns:
        Names of the layers whose bias was rounded in place.
    """
    activations, weights = getattr(detector, STATE).activations, quantized_weights(detector)
    settled = []
    for layer in structure.layers:
        module = detector.get_submodule(layer.name)
        if layer.weight is None or module.bias is None:
            continue
        _make_room(module.bias, [activations[name] for name in set(layer.inputs) if name], weights[layer.name])
        if not layer.integer or len(set(layer.inputs)) > 1:
            continue
        codes, step = _codes(module.bias, activations[layer.inputs[0]], weights[layer.name].quantizer)
        if _fit(codes):
            module.bias.copy_(codes * step)
            settled.append(layer.name)
    round_shared_biases(detector, structure)
    return settled


def round_shared_biases(detector: nn.Module, structure: Structure) -> None:
    """Makes convolutions that several levels share add, in every call, the bias rounded to that call's own grid.

    The bias itself stays as it is: export rounds it call by call. A second time changes nothing.

    Args:
        detector: The calibrated quantized detector.
        structure: Its structure.
    """
    state, weights = getattr(detector, STATE), quantized_weights(detector)
    known = {hook.layer for hook in _hooks(detector)}
    for layer in structure.layers:
        module = detector.get_submodule(layer.name)
        if layer.weight is None or len(set(layer.inputs)) < 2 or layer.name in known or module.bias is None:
            continue
        weight = weights[layer.name]
        # exported graphs have int32 biases where convolutions have int8 weights, float ones elsewhere
        # while a checkpoint is loaded, the quantizers may not be where the weights are yet
        values = float_weight(module).to(weight.quantizer.any_param().device)
        if (
            isinstance(module, nn.Linear)
            or is_transposed(module)
            or not integer_weight(weight.quantizer, weight.codes(values)).fits_int8
        ):
            continue
        hook = SharedBias(state, layer.name, layer.inputs, weight)
        state.hooks.append(hook)
        # before the output's own quantizer
        module.register_forward_hook(hook, prepend=True)


class SharedBias:
    """Forward hook of a convolution whose calls lie on several grids: the bias of each call is rounded to its own.

    Nothing is stored but the names: scales and bias are read in each call, on whatever device they are.

    Args:
        state: The detector's quantization state.
        layer: The layer's name.
        names: One activation name per call of the layer in a forward pass; None where that call's input is float.
        weight: The layer's quantized weight.
    """

    def __init__(self, state: QuantizationState, layer: str, names: list[str | None], weight: QuantizedWeight) -> None:
        self.state, self.layer, self.names, self.weight = state, layer, names, weight
        self.enabled = True
        self.calls = 0

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        rounded = self.rounded(module)
        self.calls += 1
        return None if rounded is None else output + (rounded - module.bias).reshape(-1, *[1] * len(module.kernel_size))

    @torch.no_grad()
    def rounded(self, module: nn.Module) -> Tensor | None:
        """The bias of the next call; None where it is added as it is."""
        name = self.names[self.calls % len(self.names)]
        if not (self.enabled and self._integer(name)):
            return None
        codes, step = _codes(module.bias, self.state.activations[name], self.weight.quantizer)
        return torch.where(_fit(codes), codes * step, module.bias)  # no branch: a GPU would be waited for

    def _integer(self, name: str | None) -> bool:
        state = self.state
        return (
            name is not None
            and self.weight.enabled
            and state.mode == 'quantize'
            and (state.only is None or name in state.only)
        )


@contextmanager
def float_shared_biases(detector: nn.Module) -> Iterator[None]:
    """While it lasts, shared convolutions add their bias as it is: whoever reads the graph rounds by himself."""
    hooks = [hook for hook in _hooks(detector) if hook.enabled]
    for hook in hooks:
        hook.enabled = False
    try:
        yield
    finally:
        for hook in hooks:
            hook.enabled = True


def _hooks(detector: nn.Module) -> list[SharedBias]:
    return [hook for hook in getattr(detector, STATE).hooks if isinstance(hook, SharedBias)]


def _make_room(bias: Tensor, sources: list[Quantizer], weight: QuantizedWeight) -> None:
    """Raises a weight's scale, in place, in the channels whose bias would not leave an int32 its room."""
    quantizer = weight.quantizer
    if not sources or not isinstance(quantizer, AffineQuantizer) or quantizer.num_channels is None:
        return
    needed = torch.stack([bias.abs() / (_ROOM * _per_output(source, bias)) for source in sources]).amax(0)
    scale = quantizer.positive_scale()
    needed = needed.reshape(scale.shape).to(scale)
    if (scale < needed).any():
        quantizer.scale.copy_(torch.maximum(scale, needed))
        quantizer.scale_limit.copy_(torch.maximum(quantizer.scale_limit, needed))
        weight.thaw()  # it was computed with the old scale


def _per_output(source: Quantizer, bias: Tensor) -> Tensor:
    """The scale of a layer's input, one or one per output channel."""
    scale = source.positive_scale()
    # depthwise, with a scale per input channel: each feeds as many outputs as the next
    return scale.repeat_interleave(len(bias) // len(scale)) if scale.dim() else scale


def _codes(bias: Tensor, source: Quantizer, weight: Quantizer) -> tuple[Tensor, Tensor]:
    """A bias in units of input scale x weight scale, rounded, and these units."""
    step = (_per_output(source, bias) * integer_scale(weight)).to(bias)
    return (bias / step).round_(), step


def _fit(codes: Tensor) -> Tensor:
    """Whether an int32 holds them all."""
    return codes.abs().max() <= _INT32
