"""A quantized detector that computes as integer kernels do, to be compared with a runtime code by code.

The simulation adds products of float32 numbers. Kernels add integers, exactly, and multiply the sum by one float32
factor. The two differ by a few units in the last place, which moves a value across the boundary between two codes once
in a million times; in a whole forward pass such codes change others behind them. Here the codes come from what ONNX
Runtime's kernels compute instead (QLinearConv, QLinearAdd), from the constants that
:mod:`mmdet_ptq.deploy.onnx_channel_scales` writes into the graph.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import AffineQuantizer, Quantizer
from ..wrapping import QuantizedWeight, float_weight, quantized_weights
from ..wrapping.chains import _clip_bounds
from ..wrapping.flow import Dataflow, carried
from ..wrapping.inputs import STATE, QuantizationState, QuantizedInput
from ..wrapping.layers import out_channels
from ..wrapping.operations import clips_at_zero
from .integer_biases import SharedBias, float_shared_biases
from .integer_weights import integer_weight

_INT32 = 2**31 - 1
_CONVOLUTIONS = frozenset({'conv1d', 'conv2d', 'conv3d'})
_ADDITIONS = frozenset({'add', 'add_', '__add__', '__iadd__'})
# attribute of a tensor: how kernels compute it, and the version this holds for
_RESULT = '_ptq_integer_result'


@contextmanager
def integer_arithmetic(detector: nn.Module) -> Iterator[None]:
    """While it lasts, a calibrated quantized detector gives the codes that ONNX Runtime's integer kernels give.

    For comparing only: every convolution is computed twice, in float32 and in float64, where sums of integers are
    exact. Convolutions and additions between quantized tensors (``ptq.dataflow``) are computed so, with the ReLU behind
    them that the quantizer repeats. Everything else stays the simulation: what is left float, linear layers and
    transposed convolutions, whose kernels end in float, and functions that runtimes approximate (SiLU, the sigmoid).

    Args:
        detector: The calibrated quantized detector, with its biases settled
            (:func:`mmdet_ptq.deploy.integer_biases.settle_biases`).
    """
    state: QuantizationState = getattr(detector, STATE)
    if state.flow is None:
        yield
        return
    with ExitStack() as stack:
        # the hooks here round these biases, too, and must be the last before the output's quantizer
        stack.enter_context(float_shared_biases(detector))
        watch = _Watch(state.flow)
        for hook in _convolutions(detector, watch):
            stack.callback(hook.module.register_forward_hook(hook, prepend=True).remove)
        for method in ('run', 'write'):
            setattr(state.flow, method, getattr(watch, method))
            stack.callback(delattr, state.flow, method)
        yield


@dataclass
class _Result:
    """What a kernel is about to write.

    Attributes:
        ends: Where the ReLUs behind it end: infinity, or 6.
    """

    ends: list[float] = field(default_factory=list, kw_only=True)

    def value(self, output: Quantizer) -> Tensor | None:
        """What the kernel's codes stand for; None where no integer kernel computes this."""
        levels = self.levels(output) if _is_kernel_format(output) and self._repeats_relus(output) else None
        if levels is None:
            return None
        levels = levels + output.zero_point.reshape(-1)[0]
        return output.decode(levels.clamp(*output.code_range).to(torch.int32))

    def _repeats_relus(self, output: AffineQuantizer) -> bool:
        """Whether the quantizer maps what they cut off to its ends, as export asks."""
        from .onnx_graph import SLACK
        (first, last), zero = output.code_range, output.zero_point
        scale = output.positive_scale().detach().double()
        return not self.ends or bool((zero <= first + SLACK).all()) and all(
            math.isinf(end) or bool((end / scale + zero >= last - SLACK).all()) for end in self.ends)

    def levels(self, output: AffineQuantizer) -> Tensor | None:
        """Codes minus zero point, not clipped yet."""
        raise NotImplementedError


@dataclass
class _Sum(_Result):
    """QLinearAdd, after MLAS's kernel for AVX2: fma(a, s_a / s_c, fma(b, s_b / s_c, fixed)).

    Attributes:
        a: Codes of the first summand.
        b: Those of the second.
        quantizers: Theirs.
    """

    a: Tensor
    b: Tensor
    quantizers: tuple[AffineQuantizer, AffineQuantizer]

    def levels(self, output: AffineQuantizer) -> Tensor | None:
        kinds = {(q.symmetric, q.num_channels) for q in (*self.quantizers, output)}
        if len(kinds) > 1 or output.num_channels is not None:
            return None
        zero_a, zero_b, zero = (q.zero_point.float() for q in (*self.quantizers, output))
        ratio_a, ratio_b = (q.positive_scale().detach() / output.positive_scale().detach() for q in self.quantizers)
        fixed = zero - _fma(zero_a, ratio_a, zero_b * ratio_b)
        return _fma(self.a, ratio_a, _fma(self.b, ratio_b, fixed)).round() - zero


@dataclass(frozen=True)
class _Call:
    """A call of ``torch.nn.functional.conv2d`` or its siblings.

    Attributes:
        function: Which.
        x: Its input, which a layer may have padded.
        geometry: Stride, padding, dilation, groups.
    """

    function: Callable
    x: Tensor
    geometry: tuple

    @classmethod
    def of(cls, function: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
           padding: Any = 0, dilation: Any = 1, groups: int = 1) -> _Call:
        """From what it was called with."""
        return cls(function, x, (stride, padding, dilation, groups))


@dataclass
class _ConvolutionSum(_Result):
    """QLinearConv: the exact sum of integers, times one factor per output channel.

    Attributes:
        module: The convolution.
        call: How it was computed in float.
        x: Codes of its input, minus zero point, float64.
        source: The input's quantizer.
        weight: The weight's integers, of its shape, float64.
        scale: The weight's scale, one per output channel.
    """

    module: nn.Module
    call: _Call
    x: Tensor
    source: AffineQuantizer
    weight: Tensor
    scale: Tensor

    def levels(self, output: AffineQuantizer) -> Tensor | None:
        # every step rounds to float32, in the order in which export writes the constants
        shape = (-1, *[1] * len(self.module.kernel_size))
        scale, source, target = self.scale, self.source.positive_scale().detach(), output.positive_scale().detach()
        bias = None if self.module.bias is None else self.module.bias.detach()
        if source.dim():
            scale, source = scale * source, torch.ones_like(source[0])
        if target.dim():
            scale = scale * (1 / target)
            bias = None if bias is None else bias / target
            target = torch.ones_like(target[0])
        total = self.call.function(self.x, self.weight, None, *self.call.geometry)
        if bias is not None:
            codes = (bias.double() / (scale * source).double()).round()
            if codes.abs().max() > _INT32:
                return None
            total = total + codes.reshape(shape)
        return (total.float() * (source * scale / target).reshape(shape)).round()


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The float32 nearest to a * b + c; the product of a code and a float32 is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def _is_kernel_format(quantizer: Quantizer) -> bool:
    """Whether integer kernels read and write it: 8 bits or fewer, one zero point."""
    return (isinstance(quantizer, AffineQuantizer) and quantizer.bits <= 8
            and bool((quantizer.zero_point == quantizer.zero_point.reshape(-1)[0]).all())
            and (quantizer.num_channels is None or quantizer.channel_axis == 1))


def _mark(x: Tensor, result: _Result) -> Tensor:
    setattr(x, _RESULT, (result, x._version))
    return x


def _result_of(x: Any) -> _Result | None:
    result, version = getattr(x, _RESULT, (None, None))
    return result if result is not None and version == x._version else None


def _convolutions(detector: nn.Module, watch: _Watch) -> list[_ConvolutionHook]:
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
            hook = _ConvolutionHook(watch, module, inputs[layer], weights[layer], shared.get(layer), readers)
            found += [hook] if hook.fits else []
    return found


class _ConvolutionHook:
    """Forward hook of a convolution: its output remembers what it is the sum of.

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
        self.scale = integers.scale.detach()
        self.weight = weight.layout.from_rows(integers.integers(), float_weight(module).shape).double()
        self.readers = readers

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        call = (self.inputs.calls - 1) % len(self.inputs.names)
        name = self.inputs.names[call]
        if self.bias is not None:
            self.bias.calls = call
            shifted = self.bias(module, args, output)
            output = output if shifted is None else shifted
        calls = self.watch.take_calls()
        if not self._is_integer(name) or len(calls) != 1:
            return output
        source, x = self.state.activations[name], calls[0].x
        x = source.encode(x) - source.per_channel(source.zero_point, x)
        return _mark(output, _ConvolutionSum(module, calls[0], x.double(), source, self.weight, self.scale))

    def _is_integer(self, name: str | None) -> bool:
        """Whether a call of the layer is a QLinearConv."""
        if not self.state.flow.works(name) or not _is_kernel_format(self.state.activations[name]):
            return False
        channels = self.state.activations[name].num_channels
        return channels is None or all(getattr(reader, 'groups', 1) == channels == out_channels(reader)
                                       for reader in self.readers[name])


class _Watch:
    """Stands in for the dataflow's methods: follows results to their quantizer.

    Args:
        flow: The detector's dataflow.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._run, self._write = flow.run, flow.write
        self._calls: list[_Call] = []

    def take_calls(self) -> list[_Call]:
        """The convolutions since it was last asked."""
        calls, self._calls = self._calls, []
        return calls

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """See :meth:`mmdet_ptq.wrapping.flow.Dataflow.run`."""
        name, result = getattr(func, '__name__', ''), None
        if name in _CONVOLUTIONS:
            self._calls.append(_Call.of(func, *args, **kwargs))
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
            quantizer = state.activations[name]
            # what is moved before it gets scales per channel is not quantized here
            if quantizer.num_channels is None or name not in state.moved:
                with torch.no_grad():
                    value = result.value(quantizer)
                self.take_calls()  # not a layer's own
                x = x if value is None else value
        return self._write(name, x, observes, source)

    @torch.no_grad()
    def _computed(self, name: str, args: tuple, kwargs: dict) -> _Result | None:
        """What an operation is about to write, if it is a ReLU behind a kernel or a kernel itself."""
        result = _result_of(args[0])
        if result is not None and clips_at_zero(name, args, kwargs):
            return replace(result, ends=[*result.ends, _clip_bounds(name, args, kwargs)[1]])
        if name not in _ADDITIONS or len(args) != 2 or kwargs or not all(isinstance(x, Tensor) for x in args):
            return None
        names = [carried(x) for x in args]
        if None in names or args[0].shape != args[1].shape:
            return None
        first, second = quantizers = [self.flow.state.activations[name] for name in names]
        if not all(_is_kernel_format(q) and self.flow.works(n) for q, n in zip(quantizers, names, strict=True)):
            return None
        return _Sum(first.encode(args[0]), second.encode(args[1]), (first, second))
