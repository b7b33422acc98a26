"""A quantized detector that computes as integer kernels do: what its figures are measured with.

The simulation adds products of float32 numbers. Kernels add integers, exactly, and multiply the sum by one float32
factor. The two differ by a few units in the last place, which moves a value across the boundary between two codes once
in a million times; in a whole forward pass such codes change others behind them. Here the codes come from what ONNX
Runtime's kernels compute instead (:mod:`mmdet_ptq.deploy.integers.kernels`), from the constants that
:mod:`mmdet_ptq.deploy.onnx.channel_scales` writes into the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.deploy.integers.biases import SharedBias, float_shared_biases
from mmdet_ptq.deploy.integers.kernels import (
    Average,
    Call,
    ConvolutionSum,
    GemmSum,
    HardSigmoid,
    IntegerKernel,
    Product,
    Result,
    Sum,
    by_table,
    fits_byte,
    has_one_zero_point,
    is_kernel_format,
    sigmoid,
    silu,
)
from mmdet_ptq.deploy.integers.weights import integer_weight
from mmdet_ptq.wrapping import QuantizedWeight, float_weight, quantized_weights
from mmdet_ptq.wrapping.flow import Dataflow, carried
from mmdet_ptq.wrapping.inputs import QuantizedInput
from mmdet_ptq.wrapping.names import product_of
from mmdet_ptq.wrapping.state import STATE, QuantizationState
from mmdet_ptq.wrapping.watching.layers import is_pointwise, out_channels
from mmdet_ptq.wrapping.watching.operations import PRODUCTS, clip_bounds, clips_at_zero, is_mean_of_images
from mmdet_ptq.wrapping.watching.tensors import matrices

_KERNELS = frozenset({'conv1d', 'conv2d', 'conv3d', 'linear'})
_ADDITIONS = frozenset({'add', 'add_', '__add__', '__iadd__'})
# functions that ONNX Runtime approximates in float, too
_APPROXIMATED = dict(sigmoid=sigmoid, silu=silu)
# attribute of a tensor: how kernels compute it, and the version this holds for
_RESULT = '_ptq_integer_result'


@contextmanager
def integer_arithmetic(detector: nn.Module) -> Iterator[None]:
    """While it lasts, a calibrated quantized detector gives the codes that ONNX Runtime's integer kernels give.

    For evaluating and comparing: nothing is learned through it. Convolutions, linear layers, additions and products
    between quantized tensors (``ptq.dataflow``) are computed so, with the ReLU behind them, and sigmoids and SiLU, in
    float, too. Everything else stays the simulation: what is left float, and transposed convolutions, whose kernels
    end in float. A detector without quantizers between its layers stays as it is.

    Args:
        detector: The calibrated quantized detector, with its biases settled
            (:func:`mmdet_ptq.deploy.integers.biases.settle_biases`).
    """
    state: QuantizationState = getattr(detector, STATE)
    if state.flow is None or not state.flow.between:
        yield
        return
    with ExitStack() as stack:
        # convolutions here round these biases themselves
        stack.enter_context(float_shared_biases(detector))
        # its convolutions transform the numbers and round
        stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        watch = _Watch(state.flow, _readers(detector))
        for hook in _kernel_layers(detector, watch):
            stack.callback(hook.module.register_forward_pre_hook(hook.begin).remove)
            stack.callback(hook.module.register_forward_hook(hook.end, prepend=True, always_call=True).remove)
        flow = state.flow
        for owner, method in (
            (state, 'quantize'),
            (flow, 'run'),
            (flow, 'write'),
            (flow, 'gate'),
            (flow, 'product'),
            (flow, 'multiplied'),
        ):
            setattr(owner, method, getattr(watch, method))
            stack.callback(delattr, owner, method)
        yield


def _mark(x: Tensor, result: Result) -> Tensor:
    setattr(x, _RESULT, (result, x._version))
    return x


def _result_of(x: Any) -> Result | None:
    result, version = getattr(x, _RESULT, (None, None))
    return result if result is not None and version == x._version else None


def _inputs(detector: nn.Module) -> dict[str, QuantizedInput]:
    return {hook.layer: hook for hook in getattr(detector, STATE).hooks if isinstance(hook, QuantizedInput)}


def _readers(detector: nn.Module) -> dict[str | None, list[nn.Module]]:
    """Activation name to the layers that read it."""
    readers: dict[str | None, list[nn.Module]] = {}
    for layer, hook in _inputs(detector).items():
        for name in hook.names:
            readers.setdefault(name, []).append(detector.get_submodule(layer))
    return readers


def _kernel_layers(detector: nn.Module, watch: _Watch) -> list[_Layer]:
    inputs, weights = _inputs(detector), quantized_weights(detector)
    shared = {hook.layer: hook for hook in getattr(detector, STATE).hooks if isinstance(hook, SharedBias)}
    found = []
    for layer in inputs.keys() & weights.keys():
        module = detector.get_submodule(layer)
        plain = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode == 'zeros'
        if plain or isinstance(module, nn.Linear):
            hook = _Layer(watch, module, inputs[layer], weights[layer], shared.get(layer))
            found += [hook] if hook.fits else []
    return found


class _Layer:
    """Hooks of a convolution or linear layer: its output remembers what it is the sum of.

    Args:
        watch: Sees the call.
        module: The layer.
        inputs: The hook that quantizes its input.
        weight: Its quantized weight.
        shared: The hook that rounds its bias call by call, if it has one.
    """

    def __init__(
        self,
        watch: _Watch,
        module: nn.Module,
        inputs: QuantizedInput,
        weight: QuantizedWeight,
        shared: SharedBias | None,
    ) -> None:
        self.watch, self.state, self.module, self.inputs = watch, watch.flow.state, module, inputs
        # one of its own, which is not switched off
        self.bias = None if shared is None else SharedBias(self.state, shared.layer, shared.names, weight)
        integers = integer_weight(weight.quantizer, weight.codes(float_weight(module)))
        self.fits = integers.fits_int8
        self.kernel = IntegerKernel(
            module,
            weight.layout.from_rows(integers.integers(), float_weight(module).shape).float(),
            integers.scale.detach(),
        )

    def begin(self, *_) -> None:
        """Forward pre-hook, behind the one that quantizes the input."""
        self.watch.layer = self

    def end(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Forward hook."""
        self.watch.layer = None
        if self.bias is None or output is None:
            return None
        self.bias.calls = self._call()
        result, rounded = _result_of(output), self.bias.rounded(module)
        if result is None:
            return self.bias(module, args, output)
        return None if rounded is None else _mark(result.float_value(rounded), result)

    def computed(self, call: Call) -> Tensor | None:
        """What the layer gives; None where no integer kernel computes it."""
        name = self.inputs.names[self._call()]
        if not self._is_own(call) or not self._is_integer(name):
            return None
        source = self.state.activations[name]
        total = self.kernel.sum(call, source)
        if not isinstance(self.module, nn.Linear):
            result = (GemmSum if is_pointwise(self.module) else ConvolutionSum)(self.kernel, total, source)
        elif call.x.dim() == 2 and call.bias is not None:
            result = GemmSum(self.kernel, total, source)
            if not result.has_integer_bias():  # in float, unless its output has few bits: then the runtime rounds it
                return _mark(call.function(call.x, call.weight, call.bias), result)
        else:  # MatMulIntegerToFloat, behind which the bias is added
            return ConvolutionSum(self.kernel, total, source).float_value()
        return _mark(result.float_value(), result)

    def _call(self) -> int:
        return (self.inputs.calls - 1) % len(self.inputs.names)

    def _is_own(self, call: Call) -> bool:
        """Whether a call is of the layer's own weight and bias: a layer may compute others from them."""
        own = self.module.weight
        return call.bias is self.module.bias and (call.weight is own or torch.equal(call.weight, own))

    def _is_integer(self, name: str | None) -> bool:
        """Whether an integer kernel computes a call of the layer."""
        source = self.state.activations[name] if self.state.flow.works(name) else None
        if source is None or not fits_byte(source) or source.num_channels is None:
            return source is not None and fits_byte(source)
        return self.watch.is_depthwise(name) and (has_one_zero_point(source) or self.watch.is_moved_to_zero(name))


class _Watch:
    """Stands in for the dataflow's methods: follows results to their quantizer.

    Args:
        flow: The detector's dataflow.
        readers: Activation name to the layers that read it.

    Attributes:
        layer: The layer that is being computed.
        of_layers: Activations that layers write.
    """

    def __init__(self, flow: Dataflow, readers: dict[str | None, list[nn.Module]]) -> None:
        self.flow, self.readers = flow, readers
        self._quantize = flow.state.quantize
        self._run, self._write, self._gate, self._product = flow.run, flow.write, flow.gate, flow.product
        self._multiplied = flow.multiplied
        self.layer: _Layer | None = None
        self.of_layers: set[str] = set()

    def is_depthwise(self, name: str) -> bool:
        """Whether depthwise convolutions alone read an activation with a scale per channel."""
        channels = self.flow.state.activations[name].num_channels
        return all(getattr(reader, 'groups', 1) == channels == out_channels(reader) for reader in self.readers[name])

    def is_moved_to_zero(self, name: str) -> bool:
        """Whether each channel of an activation is moved to its zero point before one quantizer rounds all.

        It is padded there, too, for all of its readers at once.
        """
        return (
            name in self.readers
            and self.is_depthwise(name)
            and name not in self.of_layers
            and len({reader.padding for reader in self.readers[name]}) == 1
        )

    def quantize(self, name: str, x: Tensor) -> Tensor:
        """See :meth:`mmdet_ptq.wrapping.inputs.QuantizationState.quantize`."""
        quantizer = self.flow.state.activations[name]
        if fits_byte(quantizer) and not has_one_zero_point(quantizer) and self.is_moved_to_zero(name):
            with torch.no_grad():
                scale, zero = (
                    quantizer.per_channel(value, x).float()
                    for value in (quantizer.positive_scale(), quantizer.zero_point)
                )
                codes = (x / scale + zero).round().clamp(*quantizer.code_range)
                x = quantizer.decode(codes.to(torch.int32))
        return self._quantize(name, x)

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """See :meth:`mmdet_ptq.wrapping.flow.Dataflow.run`."""
        name, result = getattr(func, '__name__', ''), None
        if name in _KERNELS and self.layer is not None:
            with torch.no_grad():
                value = self.layer.computed(Call.of(func, *args, **kwargs))
            if value is not None:
                return value
        elif self.flow.frames.top is not None and args:
            result = self._computed(name, args, kwargs)
            # what the detector computes outside of its modules decodes their outputs, and no runtime sees it
            if name in _APPROXIMATED and self.flow.frames.top.module:
                func = wraps(func)(partial(self._approximated, _APPROXIMATED[name]))
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
                self.of_layers.add(name)
            quantizer = state.activations[name]
            # what is moved before it gets scales per channel is not quantized here
            if quantizer.num_channels is None or name not in state.moved:
                value = result.value(quantizer)
                x = x if value is None else value
        return self._write(name, x, observes, source)

    def gate(self, kind: str, x: Tensor) -> Tensor:
        """See :meth:`mmdet_ptq.wrapping.flow.Dataflow.gate`."""
        if kind == 'sigmoid':
            return self._approximated(sigmoid, x)
        out, result = self._gate(kind, x), self._single(HardSigmoid, x)
        return out if result is None else _mark(out, result)

    @torch.no_grad()
    def _approximated(self, function: Callable[[Tensor], Tensor], x: Tensor, inplace: bool = False) -> Tensor:
        name = carried(x)
        quantizer = self.flow.state.activations[name] if self.flow.works(name) else None
        known = quantizer is not None and fits_byte(quantizer)
        out = by_table(function, x, quantizer) if known else function(x)
        return x.copy_(out) if inplace else out

    def product(self, x: Tensor, gate: Tensor) -> Tensor:
        """See :meth:`mmdet_ptq.wrapping.flow.Dataflow.product`."""
        out, result = self._product(x, gate), self._pair(Product, x, gate)
        return out if result is None else _mark(out, result)

    @torch.no_grad()
    def multiplied(self, func: Callable, args: list, kwargs: dict) -> Tensor:
        """See :meth:`mmdet_ptq.wrapping.flow.Dataflow.multiplied`."""
        places = matrices(tuple(args))
        names = [carried(args[place]) for place in places]
        quantizers = [self.flow.state.activations[name] for name in names if self.flow.works(name) and product_of(name)]
        if len(quantizers) < len(places) or not all(map(fits_byte, quantizers)):
            return self._multiplied(func, args, kwargs)
        integers, scale = list(args), torch.ones(())
        for place, quantizer in zip(places, quantizers, strict=True):
            integers[place] = (quantizer.encode(args[place]) - quantizer.zero_point).double()
            scale = scale * quantizer.positive_scale().float()
        return func(*integers, **kwargs).float() * scale

    def _computed(self, name: str, args: tuple, kwargs: dict) -> Result | None:
        """What an operation is about to write, if it is a ReLU behind a kernel, or a kernel itself."""
        result = _result_of(args[0])
        if result is not None and clips_at_zero(name, args, kwargs):
            return replace(result, ends=[*result.ends, clip_bounds(name, args, kwargs)[1]])
        if name == 'hardsigmoid' or is_mean_of_images(name, args, kwargs):
            return self._single(HardSigmoid if name == 'hardsigmoid' else Average, args[0])
        kind = Sum if name in _ADDITIONS else Product if name in PRODUCTS else None
        if kind is None or len(args) != 2 or kwargs or not all(isinstance(x, Tensor) for x in args):
            return None
        return self._pair(kind, *args)

    @torch.no_grad()
    def _single(self, kind: type[HardSigmoid | Average], x: Tensor) -> Result | None:
        name = carried(x)
        quantizer = self.flow.state.activations[name] if self.flow.works(name) else None
        known = quantizer is not None and is_kernel_format(quantizer) and quantizer.num_channels is None
        return kind(quantizer.encode(x), quantizer) if known else None

    @torch.no_grad()
    def _pair(self, kind: type[Sum | Product], a: Tensor, b: Tensor) -> Result | None:
        names = [carried(x) for x in (a, b)]
        # a tensor and a vector are added with other roundings
        if None in names or (a.shape != b.shape and kind is Sum):
            return None
        first, second = quantizers = [self.flow.state.activations[name] for name in names]
        if not all(is_kernel_format(q) and self.flow.works(n) for q, n in zip(quantizers, names, strict=True)):
            return None
        return kind(first.encode(a), second.encode(b), (first, second))
