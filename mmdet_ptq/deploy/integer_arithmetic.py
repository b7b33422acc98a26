"""A quantized detector that computes as integer kernels do: what its figures are measured with.

The simulation adds products of float32 numbers. Kernels add integers, exactly, and multiply the sum by one float32
factor. The two differ by a few units in the last place, which moves a value across the boundary between two codes once
in a million times; in a whole forward pass such codes change others behind them. Here the codes come from what ONNX
Runtime's kernels compute instead (:mod:`mmdet_ptq.deploy.integer_results`), from the constants that
:mod:`mmdet_ptq.deploy.onnx_channel_scales` writes into the graph.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..wrapping import QuantizedWeight, float_weight, quantized_weights
from ..wrapping.chains import _clip_bounds
from ..wrapping.flow import Dataflow, carried
from ..wrapping.inputs import STATE, QuantizationState, QuantizedInput
from ..wrapping.layers import out_channels
from ..wrapping.operations import GATES, PRODUCTS, clips_at_zero
from .integer_biases import SharedBias, float_shared_biases
from .integer_results import (
    Call,
    ConvolutionSum,
    IntegerKernel,
    Product,
    Result,
    Sigmoid,
    Sum,
    fits_byte,
    has_one_zero_point,
    is_kernel_format,
)
from .integer_weights import integer_weight

_CONVOLUTIONS = frozenset({'conv1d', 'conv2d', 'conv3d'})
_ADDITIONS = frozenset({'add', 'add_', '__add__', '__iadd__'})
# attribute of a tensor: how kernels compute it, and the version this holds for
_RESULT = '_ptq_integer_result'


@contextmanager
def integer_arithmetic(detector: nn.Module) -> Iterator[None]:
    """While it lasts, a calibrated quantized detector gives the codes that ONNX Runtime's integer kernels give.

    For evaluating and comparing: nothing is learned through it. Convolutions, additions, products and sigmoids between
    quantized tensors (``ptq.dataflow``) are computed so, with the ReLU behind them that the quantizer repeats.
    Everything else stays the simulation: what is left float, linear layers and transposed convolutions, whose kernels
    end in float. A detector without quantizers between its layers stays as it is.

    Args:
        detector: The calibrated quantized detector, with its biases settled
            (:func:`mmdet_ptq.deploy.integer_biases.settle_biases`).
    """
    state: QuantizationState = getattr(detector, STATE)
    if state.flow is None:
        yield
        return
    with ExitStack() as stack:
        # convolutions here round these biases themselves
        stack.enter_context(float_shared_biases(detector))
        # its convolutions transform the numbers and round
        stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        watch = _Watch(state.flow)
        for hook in _convolutions(detector, watch):
            stack.callback(hook.module.register_forward_pre_hook(hook.begin).remove)
            stack.callback(hook.module.register_forward_hook(hook.end, prepend=True, always_call=True).remove)
        for method in ('run', 'write', 'gate', 'product'):
            setattr(state.flow, method, getattr(watch, method))
            stack.callback(delattr, state.flow, method)
        yield


def _mark(x: Tensor, result: Result) -> Tensor:
    setattr(x, _RESULT, (result, x._version))
    return x


def _result_of(x: Any) -> Result | None:
    result, version = getattr(x, _RESULT, (None, None))
    return result if result is not None and version == x._version else None


def _convolutions(detector: nn.Module, watch: _Watch) -> list[_Convolution]:
    state, weights = getattr(detector, STATE), quantized_weights(detector)
    inputs = {hook.layer: hook for hook in state.hooks if isinstance(hook, QuantizedInput)}
    shared = {hook.layer: hook for hook in state.hooks if isinstance(hook, SharedBias)}
    readers: dict[str | None, list[nn.Module]] = {}
    for layer, hook in inputs.items():
        for name in hook.names:
            readers.setdefault(name, []).append(detector.get_submodule(layer))
    found = []
    for layer in inputs.keys() & weights.keys():
        module = detector.get_submodule(layer)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode == 'zeros':
            hook = _Convolution(watch, module, inputs[layer], weights[layer], shared.get(layer), readers)
            found += [hook] if hook.fits else []
    return found


class _Convolution:
    """Hooks of a convolution: its output remembers what it is the sum of.

    Args:
        watch: Sees the call.
        module: The convolution.
        inputs: The hook that quantizes its input.
        weight: Its quantized weight.
        shared: The hook that rounds its bias call by call, if it has one.
        readers: Activation name to the layers that read it.
    """

    def __init__(self, watch: _Watch, module: nn.Module, inputs: QuantizedInput, weight: QuantizedWeight,
                 shared: SharedBias | None, readers: dict[str | None, list[nn.Module]]) -> None:
        self.watch, self.state, self.module, self.inputs = watch, watch.flow.state, module, inputs
        # one of its own, which is not switched off
        self.bias = None if shared is None else SharedBias(self.state, shared.layer, shared.names, weight)
        integers = integer_weight(weight.quantizer, weight.codes(float_weight(module)))
        self.fits = integers.fits_int8
        self.kernel = IntegerKernel(
            module, weight.layout.from_rows(integers.integers(), float_weight(module).shape).float(),
            integers.scale.detach())
        self.readers = readers

    def begin(self, *_) -> None:
        """Forward pre-hook, behind the one that quantizes the input."""
        self.watch.layer = self

    def end(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Forward hook."""
        self.watch.layer = None
        if self.bias is None or output is None:
            return None
        self.bias.calls = self._call()
        result, shifted = _result_of(output), self.bias(module, args, output)
        return shifted if result is None or shifted is None else _mark(shifted, result)

    def computed(self, call: Call) -> Tensor | None:
        """What the layer's convolution gives; None where it is no QLinearConv."""
        name = self.inputs.names[self._call()]
        if not self._is_own(call) or not self._is_integer(name):
            return None
        source = self.state.activations[name]
        result = ConvolutionSum(self.kernel, self.kernel.sum(call, source), source)
        return _mark(result.float_value(), result)

    def _call(self) -> int:
        return (self.inputs.calls - 1) % len(self.inputs.names)

    def _is_own(self, call: Call) -> bool:
        """Whether a convolution is of the layer's own weight and bias: a layer may compute others from them."""
        own = self.module.weight
        return call.bias is self.module.bias and (call.weight is own or torch.equal(call.weight, own))

    def _is_integer(self, name: str | None) -> bool:
        """Whether a call of the layer is a QLinearConv."""
        source = self.state.activations[name] if self.state.flow.works(name) else None
        if source is None or not fits_byte(source) or source.num_channels is None:
            return source is not None and fits_byte(source)
        readers = self.readers[name]
        depthwise = all(getattr(reader, 'groups', 1) == source.num_channels == out_channels(reader)
                        for reader in readers)
        # with zero points of their own the channels are padded before they are quantized, for all readers at once
        return depthwise and (has_one_zero_point(source) or name not in self.watch.of_convolutions
                              and len({reader.padding for reader in readers}) == 1)


class _Watch:
    """Stands in for the dataflow's methods: follows results to their quantizer.

    Args:
        flow: The detector's dataflow.

    Attributes:
        layer: The convolution that is being computed.
        of_convolutions: Activations that convolutions write.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._run, self._write, self._gate, self._product = flow.run, flow.write, flow.gate, flow.product
        self.layer: _Convolution | None = None
        self.of_convolutions: set[str] = set()

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """See :meth:`mmdet_ptq.wrapping.flow.Dataflow.run`."""
        name, result = getattr(func, '__name__', ''), None
        if name in _CONVOLUTIONS and self.layer is not None:
            with torch.no_grad():
                value = self.layer.computed(Call.of(func, *args, **kwargs))
            if value is not None:
                return value
        elif self.flow.frames.top is not None and args:
            result = self._computed(name, args, kwargs)
        if result is None:
            return self._run(func, args, kwargs)

        @wraps(func)
        def marked(*args, **kwargs):
            return _mark(func(*args, **kwargs), result)

        return self._run(marked, args, kwargs)

    def write(self, name: str | None, x: Tensor, observes: bool, source: str) -> Tensor:
        """See :meth:`mmdet_ptq.wrapping.flow.Dataflow.write`."""
        result, state = _result_of(x), self.flow.state
        if result is not None and self.flow.works(name):
            if isinstance(result, ConvolutionSum):
                self.of_convolutions.add(name)
            quantizer = state.activations[name]
            # what is moved before it gets scales per channel is not quantized here
            if quantizer.num_channels is None or name not in state.moved:
                value = result.value(quantizer)
                x = x if value is None else value
        return self._write(name, x, observes, source)

    def gate(self, kind: str, x: Tensor) -> Tensor:
        """See :meth:`mmdet_ptq.wrapping.flow.Dataflow.gate`."""
        out, result = self._gate(kind, x), self._sigmoid(x) if kind == 'sigmoid' else None
        return out if result is None else _mark(out, result)

    def product(self, x: Tensor, gate: Tensor) -> Tensor:
        """See :meth:`mmdet_ptq.wrapping.flow.Dataflow.product`."""
        out, result = self._product(x, gate), self._pair(Product, x, gate)
        return out if result is None else _mark(out, result)

    def _computed(self, name: str, args: tuple, kwargs: dict) -> Result | None:
        """What an operation is about to write, if it is a ReLU behind a kernel, or a kernel itself."""
        result = _result_of(args[0])
        if result is not None and clips_at_zero(name, args, kwargs):
            return replace(result, ends=[*result.ends, _clip_bounds(name, args, kwargs)[1]])
        if GATES.get(name) == 'sigmoid' and isinstance(args[0], Tensor):
            return self._sigmoid(args[0])
        kind = Sum if name in _ADDITIONS else Product if name in PRODUCTS else None
        if kind is None or len(args) != 2 or kwargs or not all(isinstance(x, Tensor) for x in args):
            return None
        return self._pair(kind, *args)

    @torch.no_grad()
    def _sigmoid(self, x: Tensor) -> Result | None:
        name = carried(x)
        quantizer = self.flow.state.activations[name] if self.flow.works(name) else None
        if quantizer is None or not is_kernel_format(quantizer):
            return None
        return Sigmoid(quantizer.encode(x), quantizer)

    @torch.no_grad()
    def _pair(self, kind: type[Sum | Product], a: Tensor, b: Tensor) -> Result | None:
        names = [carried(x) for x in (a, b)]
        if None in names or a.shape != b.shape:
            return None
        first, second = quantizers = [self.flow.state.activations[name] for name in names]
        if not all(is_kernel_format(q) and self.flow.works(n) for q, n in zip(quantizers, names, strict=True)):
            return None
        return kind(first.encode(a), second.encode(b), (first, second))
