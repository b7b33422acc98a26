"""What a quantized detector carries: its activation quantizers, its mode, how far a forward pass has come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import Observer, Quantizer
from mmdet_ptq.wrapping.watching.tensors import own_copy
from mmdet_ptq.wrapping.weights import QuantizedWeight, quantized_weights


class ChannelDivision(nn.Module):
    """Divides the channels of a tensor by fixed factors.

    Args:
        channels: Number of channels.
        axis: Their axis.
    """

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer('factor', torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Divides a tensor, of any shape that has the channels on the axis."""
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return x / self.factor.view(shape)


STATE = 'ptq'  # attribute of the detector that holds its quantization state
MODES = ('float', 'observe', 'quantize')


def mixed(x: Tensor, other: Tensor, share: float) -> Tensor:
    """Takes each value from ``other`` with probability ``share``, to 1/256, else from ``x``."""
    limit = round(256 * share)
    if limit > 255:  # no byte is below it, as torch compares
        return other.clone()
    words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 7) // 8,), device=x.device)
    # random bytes and lerp: five times as fast on a CPU as random floats and where
    chosen = words.view(torch.uint8)[: x.numel()].view(x.shape) < limit
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

    def __init__(
        self,
        quantizers: dict[str, Quantizer],
        readers: dict[str, int],
        moved: Collection[str] = (),
        divisions: Mapping[str, ChannelDivision] | None = None,
    ) -> None:
        super().__init__()
        self.activations = nn.ModuleDict(quantizers)
        self.divisions = nn.ModuleDict(divisions)
        self.readers = readers
        self.moved = frozenset(moved)
        self.flow: Any = None  # the quantizers between the layers
        self.mode = 'quantize'
        self.only: frozenset[str] | None = None  # the activations that the mode holds for; None: all
        self.drop = 0.0  # QDrop: share of the values that stay float
        self.observers: dict[str, Observer] = {}
        # what is observed, in the order in which it is computed, instead of showing it to the observers
        self.recorded: list[tuple[str, Tensor]] | None = None
        self.hooks: list[Any] = []  # of inputs and outputs; each counts its calls
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

    def quantize(self, name: str, x: Tensor) -> Tensor:
        """Simulated quantization of an activation, some of which may stay float (:attr:`drop`)."""
        out = self.activations[name](x)
        return mixed(out, x, self.drop) if self.drop else out

    def divided(self, name: str, x: Tensor) -> Tensor:
        """A tensor with its channels divided by what weights took over, where they did."""
        return self.divisions[name](x) if name in self.divisions else x

    def observe(self, name: str, x: Tensor, where: str) -> Tensor:
        """Lets an activation's observer see a tensor, or records it; returns what is computed with."""
        if self.recorded is not None:
            # whoever would read it quantized reads a copy, so that the gradient is that of what quantization changes;
            # a copy is kept, too: either may be written to in place
            self.recorded.append((name, own_copy(x)))
            return self.recorded[-1][1].clone()
        try:
            self.observers[name].update(x.detach())
        except PTQError as error:
            raise PTQError(f'{where}: {error}') from error
        return x

    def read(self, name: str, x: Tensor, layer: str) -> Tensor:
        """A tensor as a layer reads it, quantized or observed once for all its readers."""
        shared = self._shared.get(name)
        if shared is not None and shared[0] is x and shared[1] == x._version:
            out, left = shared[2], shared[3] - 1
            if left:
                self._shared[name] = (x, shared[1], out, left)
            else:
                del self._shared[name]
            return out
        out = self.divided(name, x)
        if self.mode == 'observe':
            out = self.observe(name, out, f'input of layer {layer}')
        else:
            out = self.quantize(name, out)
        if self.readers[name] > 1:
            self._shared[name] = (x, x._version, out, self.readers[name] - 1)
        return out


def with_input(args: tuple, kwargs: dict, change: Callable[[Tensor], Tensor]) -> tuple[tuple, dict]:
    """A layer's arguments with its input changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    key = next(iter(kwargs))
    return args, {**kwargs, key: change(kwargs[key])}


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
    """Runs a block of code with the detector in another mode (see :func:`set_mode`); one without modes is float."""
    if not is_quantized(detector):
        yield
        return
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
    with quantize_only(
        detector, [name for name in state.activations if state.readers[name]], quantized_weights(detector)
    ):
        yield
