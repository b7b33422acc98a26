"""Quantized tensors between the layers: outputs of layers and of functional operations, while the detector runs.

Nobody's code is rewritten. A ``TorchFunctionMode`` is active during a forward pass of the whole detector, and finds
each operation by the module whose ``forward`` calls it, by the how-manieth call of this module it is, and by the
how-manieth call of this function therein.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.names import output_name
from mmdet_ptq.wrapping.state import STATE, QuantizationState
from mmdet_ptq.wrapping.watching.frames import Frame, Frames
from mmdet_ptq.wrapping.watching.layers import QUANTIZABLE
from mmdet_ptq.wrapping.watching.operations import (
    GATED,
    MOVEMENT,
    MOVEMENT_NAMES,
    classify,
    keeps_channels,
    works_in_place,
)
from mmdet_ptq.wrapping.watching.tensors import matrices, tensors_in
from mmdet_ptq.wrapping.weights import quantized_weights

# attribute of a tensor: the activation quantizer whose values it holds, and the version they were written with
_CARRIED = '_ptq_activation'


@dataclass(frozen=True)
class Place:
    """One call of a functional operation in a forward pass.

    Attributes:
        module: Path of the module whose forward calls the function.
        call: Which call of the module in a forward pass.
        function: The function's name.
        index: Which call of the function within that call of the module.
    """

    module: str
    call: int
    function: str
    index: int

    @property
    def key(self) -> tuple[str, int, str, int]:
        return self.module, self.call, self.function, self.index

    def to_dict(self) -> dict:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Site(Place):
    """One call of a functional operation whose result is quantized, or that works in place on a quantized tensor.

    Attributes:
        activation: The activation quantizer of its result; None where it only works in place.
        gate: That of the (hard) sigmoid inside a SiLU or HardSwish; None for other functions.
        observes: Whether the activation's range is observed here, not where layers read it.
    """

    activation: str | None
    gate: str | None = None
    observes: bool = False


@dataclass(frozen=True)
class Product(Place):
    """One product of two matrices, both of them activations, which are quantized where it reads them.

    Attributes:
        factors: Their activation quantizers.
        macs: Multiply-accumulates for one image.
    """

    factors: list[str]
    macs: int


def carried(x: Tensor) -> str | None:
    """The activation quantizer whose values a tensor holds, if it is known."""
    name, version = getattr(x, _CARRIED, (None, None))
    return name if name is not None and version == x._version else None


class Dataflow:
    """The quantizers between the layers of one detector.

    Args:
        state: The detector's quantization state.
        places: The operations that are looked for.
        calls: Path of every module whose forward calls a function of a place, to how often it runs in a pass.

    Attributes:
        enabled: Whether anything is quantized between the layers.
        between: Whether more than products of activations is.
    """

    def __init__(self, state: QuantizationState, places: list[Site | Product], calls: dict[str, int]) -> None:
        self.state = state
        self.places = {place.key: place for place in places}
        self.functions = frozenset(place.function for place in places)
        self.module_calls = dict(calls)
        self.frames = Frames()
        self.active = False
        self.enabled = True
        self.between = any(isinstance(place, Site) for place in places)

    def reset(self) -> None:
        """Starts a forward pass."""
        self.frames.calls.clear()

    def set_calls(self, unit: str, call: int, calls: int) -> None:
        """Says that a module is about to run for the ``call``-th of ``calls`` times, and what is in it accordingly."""
        for module, total in self.module_calls.items():
            if module == unit or module.startswith(f'{unit}.'):
                self.frames.calls[module] = call * total // calls

    @contextmanager
    def running(self, whole: bool) -> Iterator[None]:
        """Quantizes, or observes, what is computed inside.

        Args:
            whole: The detector as a whole runs; otherwise a part of it by itself.
        """
        if self.active or not self.enabled or self.state.mode == 'float':
            yield
            return
        self.active = True
        self.frames.stack[:] = [Frame('', 0) if whole else None]
        try:
            with _FlowMode(self):
                yield
        finally:
            self.active = False
            self.frames.stack.clear()

    def check_running(self, layer: str) -> None:
        """Refuses a layer that runs outside of a pass, where the operations between the layers are not seen.

        Raises:
            PTQError: Somebody called a part of the detector by itself.
        """
        if self.enabled and not self.active and self.state.mode == 'quantize' and (self.places or self.module_calls):
            raise PTQError(
                f'a part of the quantized detector, with the layer {layer}, was called by itself, and what is '
                'quantized between the layers (`ptq.dataflow`, `ptq.products`) is known for whole passes alone; call '
                "the detector or its `predict`, or quantize it with `ptq.dataflow=None` and `ptq.products='float'`."
            )

    @contextmanager
    def muted(self) -> Iterator[None]:
        """What is computed inside is none of the detector's own operations."""
        self.frames.mute()
        try:
            yield
        finally:
            self.frames.leave()

    def works(self, name: str | None) -> bool:
        """Whether an activation quantizer is there and switched on."""
        state = self.state
        return (
            self.enabled
            and name is not None
            and name in state.activations
            and state.mode == 'quantize'
            and (state.only is None or name in state.only)
        )

    def write(self, name: str | None, x: Tensor, observes: bool, source: str) -> Tensor:
        """Quantizes, observes or passes a tensor that was just computed."""
        state = self.state
        if self.works(name):
            if carried(x) == name:
                return x
            if state.activations[name].num_channels is not None and name in state.moved:
                return x  # no scale per channel goes through what comes next
            out = state.quantize(name, x)
            setattr(out, _CARRIED, (name, out._version))
            return out
        if observes and state.mode == 'observe' and name in state.observers:
            return state.observe(name, x, f'output of {source}')
        return x

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Computes a functional operation, with what belongs to it."""
        name, frame, site = getattr(func, '__name__', ''), self.frames.top, None
        if frame is None:
            return func(*args, **kwargs)
        if name in self.functions:
            # counts every call, whether anything is quantized there or not
            site = self.places.get(frame.next(name))
        if isinstance(site, Product):
            return self._multiply(site, func, args, kwargs)
        if site is not None and torch.is_grad_enabled() and works_in_place(name, kwargs) and carried(args[0]):
            # what a quantizer returned is what its gradient is computed from
            args = (args[0].clone(), *args[1:])
        if site is not None and self.works(site.gate):
            out = self._gated(site, args[0] if args else kwargs['input'])
        else:
            out = func(*args, **kwargs)
        if name in MOVEMENT_NAMES and self.state.mode == 'quantize':
            self._carry_on(func, name, args, kwargs, out)
        if site is not None:
            out = self.write(site.activation, out, site.observes, f'`{name}` in {site.module or "the detector"}')
        return out

    def _multiply(self, product: Product, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        factors, where = list(args), f'`{product.function}` in {product.module or "the detector"}'
        for name, place in zip(product.factors, matrices(args), strict=True):
            factors[place] = self.write(name, args[place], True, where)
        return self.multiplied(func, factors, kwargs)

    def multiplied(self, func: Callable, args: list, kwargs: dict) -> Tensor:
        """A product of matrices."""
        return func(*args, **kwargs)

    def _gated(self, site: Site, x: Tensor) -> Tensor:
        gate = self.write(site.gate, self.gate(GATED[site.function], x), False, site.function)
        return self.product(x, gate)

    def gate(self, kind: str, x: Tensor) -> Tensor:
        """The first half of a gated activation."""
        return torch.sigmoid(x) if kind == 'sigmoid' else F.hardsigmoid(x)

    def product(self, x: Tensor, gate: Tensor) -> Tensor:
        """The second half."""
        return x * gate

    def _carry_on(self, func: Callable, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        """What is moved is still what its quantizer wrote."""
        sources = {carried(t) for t in tensors_in([args, kwargs]) if t.is_floating_point()}
        source = sources.pop() if len(sources) == 1 else None
        if source is None or classify(func, name, args, kwargs) != MOVEMENT:
            return
        if keeps_channels(name) or self.state.activations[source].num_channels is None:
            for tensor in tensors_in(out):
                if tensor.is_floating_point():
                    setattr(tensor, _CARRIED, (source, tensor._version))


class _FlowMode(TorchFunctionMode):
    """Hands every functional call to the dataflow."""

    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.flow.run(func, args, kwargs or {})


class _Enter:
    """Forward pre-hook: a module whose operations count, or do not (no name), begins."""

    def __init__(self, flow: Dataflow, module: str | None) -> None:
        self.flow, self.module = flow, module

    def __call__(self, *_) -> None:
        if self.flow.active:
            if self.module is None:
                self.flow.frames.mute()
            else:
                self.flow.frames.enter(self.module)


class _Leave:
    """Forward hook: the module ends."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow

    def __call__(self, *_) -> None:
        if self.flow.active:
            self.flow.frames.leave()


class _Running:
    """A method of the detector that is a whole pass.

    Hooks would not do: an interrupt from the keyboard passes them, the mode would stay.
    """

    def __init__(self, flow: Dataflow, forward: Callable) -> None:
        self.flow, self.forward = flow, forward
        self.__doc__ = forward.__doc__

    def __call__(self, *args, **kwargs):
        if not self.flow.active:
            self.flow.state.reset()  # nobody called the detector itself, whose hooks do that
        with self.flow.running(whole=True):
            return self.forward(*args, **kwargs)


class QuantizedOutput:
    """Forward hook of one layer whose output is quantized.

    Args:
        state: The detector's quantization state.
        layer: The layer's name.
        names: One activation name per call of the layer in a forward pass; None leaves that call's output alone.
    """

    def __init__(self, state: QuantizationState, layer: str, names: list[str | None]) -> None:
        self.state, self.layer, self.names = state, layer, names
        self.own = [output_name(layer, call if len(names) > 1 else None) for call in range(len(names))]
        self.calls = 0

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        call = self.calls % len(self.names)
        self.calls += 1
        name, flow = self.names[call], self.state.flow
        if name is None:
            return None
        with flow.muted():
            return flow.write(name, output, name == self.own[call], f'layer {self.layer}')


def attach_dataflow(
    detector: nn.Module,
    state: QuantizationState,
    outputs: dict[str, list[str | None]],
    places: list[Site | Product],
    calls: dict[str, int],
) -> None:
    """Puts quantizers between the layers of a detector that has its quantized weights and inputs.

    Args:
        detector: The detector.
        state: Its quantization state, which holds the quantizers.
        outputs: Layer name to one activation name per call.
        places: The operations that are looked for.
        calls: See :class:`Dataflow`.
    """
    flow = state.flow = Dataflow(state, places, calls)
    flow.between |= bool(outputs)
    modules = dict(detector.named_modules())
    for name, module in modules.items():
        if name in calls and name:
            _around(module, flow, name)
    for inside in (*quantized_weights(detector).values(), *(m for m in modules.values() if isinstance(m, QUANTIZABLE))):
        _around(inside, flow, None)
    for name, names in outputs.items():
        hook = QuantizedOutput(state, name, names)
        state.hooks.append(hook)
        modules[name].register_forward_hook(hook)
    # trackers call `predict`
    for method in ('forward', 'predict'):
        if hasattr(detector, method):
            setattr(detector, method, _Running(flow, getattr(detector, method)))


def _around(module: nn.Module, flow: Dataflow, name: str | None) -> None:
    module.register_forward_pre_hook(_Enter(flow, name), prepend=True)
    module.register_forward_hook(_Leave(flow), always_call=True)


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


def set_unit(state: QuantizationState, unit: str, layers: dict[str, int], call: int, calls: int) -> None:
    """Says which call of a module comes next, where a part of the detector runs by itself.

    Args:
        state: The detector's quantization state.
        unit: Path of the module.
        layers: Its layers, and how often each runs in one call of it.
        call: Which call comes next.
        calls: How many there are in a forward pass.
    """
    state.set_calls({layer: call * count for layer, count in layers.items()})
    if state.flow is not None:
        state.flow.set_calls(unit, call, calls)


def running(state: QuantizationState) -> AbstractContextManager:
    """Surrounds a part of the detector that runs by itself; the whole detector needs nothing of the kind."""
    return nullcontext() if state.flow is None else state.flow.running(whole=False)
