"""Quantized inputs as forward pre-hooks: one quantizer per tensor, one range per call of a shared layer."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext

from torch import Tensor, nn

from mmdet_ptq.wrapping.flow import carried
from mmdet_ptq.wrapping.state import STATE, ChannelDivision, QuantizationState, with_input
from mmdet_ptq.wrapping.weights import quantized_weights


class QuantizedInput:
    """Forward pre-hook of one layer. An object, not a closure, so that a deep copy refers to its own state.

    Args:
        state: The detector's quantization state.
        layer: The layer's name, for messages.
        names: One activation name per call of the layer in a forward pass; None leaves that call's input float.
    """

    def __init__(self, state: QuantizationState, layer: str, names: list[str | None]) -> None:
        self.state = state
        self.layer = layer
        self.names = names
        self.calls = 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name = self.names[self.calls % len(self.names)]
        self.calls += 1
        if self.state.flow is not None:
            self.state.flow.check_running(self.layer)
        if name is None:
            return args, kwargs
        return with_input(args, kwargs, lambda x: apply_to(self.state, name, x, self.layer))


class _ForwardScope:
    """Hooks of the detector itself: a forward pass begins and ends."""

    def __init__(self, state: QuantizationState, begins: bool) -> None:
        self.state = state
        self.begins = begins

    def __call__(self, *_) -> None:
        self.state.reset()
        for weight in self.state.weights:
            weight.set_caching(self.begins)


def attach_inputs(detector: nn.Module, state: QuantizationState, inputs: dict[str, list[str | None]]) -> None:
    """Puts the quantization state and the hooks into a detector whose weights are already quantized.

    Args:
        detector: The detector.
        state: Its activation quantizers.
        inputs: Layer name to one activation name per call.
    """
    for name, names in inputs.items():
        hook = QuantizedInput(state, name, names)
        state.hooks.append(hook)
        detector.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    state.weights = tuple(quantized_weights(detector).values())
    setattr(detector, STATE, state)
    detector.register_forward_pre_hook(_ForwardScope(state, begins=True))
    detector.register_forward_hook(_ForwardScope(state, begins=False), always_call=True)


def apply_to(state: QuantizationState, name: str, x: Tensor, layer: str) -> Tensor:
    """Quantizes, observes or passes a tensor that a layer is about to read."""
    if state.flow is not None and carried(x) == name:
        return x  # it was quantized where it was computed
    with nullcontext() if state.flow is None else state.flow.muted():
        if state.mode == 'float' or (state.only is not None and name not in state.only):
            return state.divided(name, x)
        return state.read(name, x, layer)


def divisions_of(state: QuantizationState, layers: Collection[str]) -> dict[str, ChannelDivision]:
    """Layer name to the division of its input, for those of the given layers that have one."""
    # a layer that is called several times has none
    return {
        hook.layer: state.divisions[hook.names[0]]
        for hook in state.hooks
        if isinstance(hook, QuantizedInput) and hook.layer in layers and hook.names[0] in state.divisions
    }
