"""Quantized inputs as forward pre-hooks: one quantizer per tensor, one range per call of a shared layer."""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..errors import PTQError
from ..quantizers import Observer, Quantizer
from .flow import Dataflow, QuantizedOutput, carried
from .migration import ChannelDivision
from .weights import QuantizedWeight, quantized_weights

STATE = 'ptq'  # attribute of the detector that holds its quantization state
MODES = ('float', 'observe', 'quantize')


def mixed(x: Tensor, other: Tensor, share: float) -> Tensor:
    """Takes each value from ``other`` with probability ``share``, to 1/256, else from ``x``."""
    words = torch.randint(-2**63, 2**63 - 1, ((x.numel() + 7) // 8,), device=x.device)
    # random bytes and lerp: five times as fast on a CPU as random floats and where
    chosen = words.view(torch.uint8)[:x.numel()].view(x.shape) < round(256 * share)
    return torch.lerp(x, other, chosen.to(x.dtype))


class QuantizationState(nn.Module):
    """What a quantized detector carries: its activation quantizers and how far a forward pass has come.

    Lives in the detector as ``detector.ptq``, so that ``.to()``, ``state_dict`` and deep copies include it.

    Args:
        quantizers: Activation name to quantizer.
        readers: Activation name to how many layer calls read it in one forward pass.
        moved: Activations that are quantized where their values are computed, before they are moved into the tensor
            that layers read; a scale per channel would not fit there. Defaults to none.
        divisions: Activation name to the division of its channels by what weights took over, in front of the
            quantizer. Defaults to none.
    """

    def __init__(self, quantizers: dict[str, Quantizer], readers: dict[str, int], moved: Collection[str] = (),
                 divisions: Mapping[str, ChannelDivision] | None = None) -> None:
        super().__init__()
        self.activations = nn.ModuleDict(quantizers)
        self.divisions = nn.ModuleDict(divisions)
        self.readers = readers
        self.moved = frozenset(moved)
        self.flow: Dataflow | None = None  # the quantizers between the layers
        self.mode = 'quantize'
        self.only: frozenset[str] | None = None  # the activations that the mode holds for; None: all
        self.drop = 0.0  # QDrop: share of the values that stay float
        self.observers: dict[str, Observer] = {}
        self.hooks: list[QuantizedInput | QuantizedOutput] = []
        # in a tuple, which registers nothing; to walk the detector for them takes longer than a small layer
        self.weights: tuple[QuantizedWeight, ...] = ()
        # activation -> (tensor, version, quantized tensor, readers left); the reason for one quantizer per tensor
        # is also that its work is done once
        self._shared: dict[str, tuple[Tensor, int, Tensor, int]] = {}

    def reset(self) -> None:
        """Starts a forward pass: every layer is about to be called for the first time."""
        self._shared.clear()
        for hook in self.hooks:
            hook.calls = 0
        if self.flow is not None:
            self.flow.reset()

    def set_calls(self, calls: dict[str, int]) -> None:
        """Says which call of some layers comes next, where a part of the detector runs by itself."""
        for hook in self.hooks:
            if hook.layer in calls:
                hook.calls = calls[hook.layer]

    def set_unit(self, unit: str, layers: dict[str, int], call: int, calls: int) -> None:
        """Says which call of a module comes next, where a part of the detector runs by itself.

        Args:
            unit: Path of the module.
            layers: Its layers, and how often each runs in one call of it.
            call: Which call comes next.
            calls: How many there are in a forward pass.
        """
        self.set_calls({layer: call * count for layer, count in layers.items()})
        if self.flow is not None:
            self.flow.set_calls(unit, call, calls)

    def running(self) -> AbstractContextManager:
        """Surrounds a part of the detector that runs by itself; the whole detector needs nothing of the kind."""
        return nullcontext() if self.flow is None else self.flow.running(whole=False)

    def quantize(self, name: str, x: Tensor) -> Tensor:
        """Simulated quantization of an activation, some of which may stay float (:attr:`drop`)."""
        out = self.activations[name](x)
        return mixed(out, x, self.drop) if self.drop else out

    def apply_to(self, name: str, x: Tensor, layer: str) -> Tensor:
        """Quantizes, observes or passes a tensor that a layer is about to read."""
        if self.flow is not None and carried(x) == name:
            return x  # it was quantized where it was computed
        with nullcontext() if self.flow is None else self.flow.muted():
            if self.mode == 'float' or (self.only is not None and name not in self.only):
                return self._divided(name, x)
            return self._read(name, x, layer)

    def _divided(self, name: str, x: Tensor) -> Tensor:
        return self.divisions[name](x) if name in self.divisions else x

    def divisions_of(self, layers: Collection[str]) -> dict[str, ChannelDivision]:
        """Layer name to the division of its input, for those of the given layers that have one."""
        # a layer that is called several times has none
        return {hook.layer: self.divisions[hook.names[0]] for hook in self.hooks
                if isinstance(hook, QuantizedInput) and hook.layer in layers and hook.names[0] in self.divisions}

    def _read(self, name: str, x: Tensor, layer: str) -> Tensor:
        shared = self._shared.get(name)
        if shared is not None and shared[0] is x and shared[1] == x._version:
            out, left = shared[2], shared[3] - 1
            if left:
                self._shared[name] = (x, shared[1], out, left)
            else:
                del self._shared[name]
            return out
        out = self._divided(name, x)
        if self.mode == 'observe':
            try:
                self.observers[name].update(out.detach())
            except PTQError as error:
                raise PTQError(f'input of layer {layer}: {error}') from error
        else:
            out = self.quantize(name, out)
        if self.readers[name] > 1:
            self._shared[name] = (x, x._version, out, self.readers[name] - 1)
        return out


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
        if name is None:
            return args, kwargs
        return with_input(args, kwargs, lambda x: self.state.apply_to(name, x, self.layer))


def with_input(args: tuple, kwargs: dict, change: Callable[[Tensor], Tensor]) -> tuple[tuple, dict]:
    """A layer's arguments with its input changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    key = next(iter(kwargs))
    return args, {**kwargs, key: change(kwargs[key])}


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


def is_quantized(detector: nn.Module) -> bool:
    """Whether the detector carries a quantization state."""
    return isinstance(getattr(detector, STATE, None), QuantizationState)


def set_mode(detector: nn.Module, mode: str) -> None:
    """Switches a quantized detector between ``'float'``, ``'observe'`` and ``'quantize'``.

    While observing, weights are float: ranges belong to the float detector.
    """
    if mode not in MODES:
        raise ValueError(f'mode must be one of {MODES}, got {mode!r}')
    state = getattr(detector, STATE)
    state.mode = mode
    for weight in state.weights:
        weight.enabled = mode == 'quantize'


@contextmanager
def quantization_mode(detector: nn.Module, mode: str) -> Iterator[None]:
    """Runs a block of code with the detector in another mode (see :func:`set_mode`)."""
    before = getattr(detector, STATE).mode
    set_mode(detector, mode)
    try:
        yield
    finally:
        set_mode(detector, before)


@contextmanager
def quantize_only(detector: nn.Module, activations: Collection[str], weights: Collection[str]) -> Iterator[None]:
    """Runs a block of code with the named tensors quantized and everything else float.

    Args:
        detector: The quantized detector.
        activations: Activation names.
        weights: Names of the layers whose weight is quantized.
    """
    state = getattr(detector, STATE)
    with quantization_mode(detector, 'quantize'):
        state.only = frozenset(activations)
        for name, weight in quantized_weights(detector).items():
            weight.enabled = name in weights
        try:
            yield
        finally:
            state.only = None


@contextmanager
def only_read_tensors(detector: nn.Module) -> Iterator[None]:
    """Runs a block of code in which of the tensors between the layers only those are quantized that a layer reads.

    That is what OpenVINO is given: it fuses what lies between the layers. Whoever else reads such a tensor reads it
    quantized.
    """
    state = getattr(detector, STATE)
    with quantize_only(detector, [name for name in state.activations if state.readers[name]],
                       quantized_weights(detector)):
        yield


@contextmanager
def without_dataflow(detector: nn.Module) -> Iterator[None]:
    """Runs a block of code in which layers quantize what they read, and nothing else is quantized.

    That is what ncnn is given: it computes in float between the layers.
    """
    flow = getattr(detector, STATE).flow
    if flow is None:
        yield
        return
    flow.enabled = False
    try:
        yield
    finally:
        flow.enabled = True
