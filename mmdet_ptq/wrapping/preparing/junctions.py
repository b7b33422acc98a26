"""Which layers may hand a per-channel factor to each other without changing what the detector computes.

One forward pass is watched, operation by operation. Every tensor is put into a class together with the tensors it
becomes through operations that a positive per-channel factor passes (identity, ReLU, leaky ReLU, pooling,
interpolation, sums). A class is usable when only layers write it and only layers read it: then the writers' rows may
be divided, and the readers' columns multiplied, by the same factors. Whatever else reads a tensor makes its class
unusable, and an operation that is not known counts as something else.

ReLU6 lets a factor pass only where its upper clip never acts. That cannot be seen from images, but often be proven:
what a layer computes from tensors that are themselves clipped is bounded by its weights. Channels without proof keep
the factor 1. Moving the clip with the factor would be exact, too, but costs a per-channel minimum at inference, and
leaving the clip out is not exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from mmdet_ptq.wrapping.watching.layers import QUANTIZABLE, in_channels, is_transposed, out_channels
from mmdet_ptq.wrapping.watching.operations import clip_bounds, drops, pads_with_zero
from mmdet_ptq.wrapping.watching.tensors import (
    METADATA,
    WEIGHTED_FUNCTIONS,
    function_name,
    gradients_everywhere,
    key_of,
    tensors_in,
    walk_back,
)

# a positive per-channel factor passes unchanged, whatever the axis of the channels
_POINTWISE = {
    'relu',
    'relu_',
    'leaky_relu',
    'leaky_relu_',
    'dropout',
    'dropout2d',
    'contiguous',
    'clone',
    'to',
    'float',
    'double',
    'type_as',
}
# the same, as long as the channels are axis 1
_SPATIAL = {
    'max_pool1d',
    'max_pool2d',
    'max_pool3d',
    'avg_pool1d',
    'avg_pool2d',
    'avg_pool3d',
    'adaptive_avg_pool1d',
    'adaptive_avg_pool2d',
    'adaptive_avg_pool3d',
    'adaptive_max_pool2d',
    'interpolate',
    'prelu',
    'pad',
}
_SUMS = {'add', 'add_', 'sub', 'sub_', '__add__', '__iadd__', '__radd__', '__sub__', '__isub__'}
_CLIPS = {'hardtanh', 'hardtanh_', 'relu6', 'clamp', 'clamp_', 'clip', 'clip_'}
# rounding of the bound itself
_SLACK = 1 + 1e-6


@dataclass(frozen=True, eq=False)
class Junction:
    """Layers around one class of tensors.

    Attributes:
        producers: Layers that write the tensors, in the order in which they ran.
        readers: Layers that read them.
        floor: Least factor a producer's row may be divided by, (C,); a smaller one would reach a clip.
        fixed: Channels whose factor must stay 1, (C,) bool.
    """

    producers: tuple[str, ...]
    readers: tuple[str, ...]
    floor: Tensor
    fixed: Tensor

    def __str__(self) -> str:
        return f'{", ".join(self.producers)} -> {", ".join(self.readers)}'


@dataclass(frozen=True)
class Skipped:
    """A layer whose output no factor can leave.

    Attributes:
        producer: The layer.
        readers: The layers that come next.
        reason: What stands between.
    """

    producer: str
    readers: tuple[str, ...]
    reason: str


@dataclass
class _Operation:
    kind: str  # 'layer', 'pass', 'sum', 'clip', 'other'
    name: str  # of the function, or of the layer
    inputs: list[tuple[int, int]]
    outputs: list[tuple[int, int]]
    bounds: tuple[float, float] = (-inf, inf)
    nonnegative: bool = False
    axis: int | None = None


@dataclass
class _Recorder:
    """Everything one forward pass did, and the classes that follow from it."""

    layers: dict[str, nn.Module]
    operations: list[_Operation] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)  # so that an id is never used twice
    makers: dict[Any, list] = field(default_factory=lambda: defaultdict(list))  # autograd node -> tensors
    written: set[tuple[int, int]] = field(default_factory=set)
    touched: dict[str, str] = field(default_factory=dict)  # layer -> who else reads its weight

    def __post_init__(self) -> None:
        self.owner: dict[int, str] = {}
        for name, layer in self.layers.items():
            for parameter in layer.parameters(recurse=False):
                other = self.owner.setdefault(id(parameter), name)
                if other != name:
                    self.touched[name] = f'its weight is that of {other}, too'
                    self.touched[other] = f'its weight is that of {name}, too'

    def add(self, operation: _Operation) -> None:
        self.operations.append(operation)
        self.written.update(operation.outputs)

    def read(self, tensor: Tensor) -> tuple[int, int]:
        key, node = self.keep(tensor), tensor.grad_fn
        if key not in self.written and isinstance(node, BackwardCFunction):
            # a function with a kernel of its own is not seen while it runs, only in the graph it leaves
            inputs = [k for source, _ in node.next_functions for k in self.makers.get(source, ())]
            self.add(_Operation('other', function_name(node), inputs, [key]))
        return key

    def keep(self, tensor: Tensor) -> tuple[int, int]:
        self.alive.append(tensor)
        key = key_of(tensor)
        if tensor.grad_fn is not None:
            self.makers[tensor.grad_fn].append(key)
        return key


class _Watch(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', str(func))
        if name in METADATA or name in ('__set__', 'requires_grad_'):
            return func(*args, **kwargs)
        read = list(tensors_in([args, kwargs]))
        inputs = [self.recorder.read(t) for t in read]  # before an in-place function raises the version
        out = func(*args, **kwargs)
        written = list(tensors_in(out))
        changed = [t for t, key in zip(read, inputs, strict=True) if key_of(t) != key]
        written += [t for t in changed if not any(t is other for other in written)]
        if name == '__get__' and not written:
            return out
        operation = _classify(self.recorder, func, name, args, kwargs, read, inputs, out)
        operation.outputs = [self.recorder.keep(t) for t in written]
        self.recorder.add(operation)
        return out


def _classify(
    recorder: _Recorder,
    func: Callable,
    name: str,
    args: tuple,
    kwargs: dict,
    read: list[Tensor],
    inputs: list,
    out: Any,
) -> _Operation:
    other = _Operation('other', name, inputs, [])
    if func in WEIGHTED_FUNCTIONS:
        layer = recorder.owner.get(id(args[1] if len(args) > 1 else kwargs.get('weight')))
        bias = args[2] if len(args) > 2 else kwargs.get('bias')
        if layer is not None and bias is recorder.layers[layer].bias:
            module = recorder.layers[layer]
            last = isinstance(module, nn.Linear)
            if not last and read[0].ndim != module.weight.ndim:
                return other  # an image without its batch axis
            axis = None if last and read[0].ndim == 2 else -1 if last else 1
            return _Operation('layer', layer, inputs[:1], [], axis=axis)
    for tensor in read:
        if id(tensor) in recorder.owner:
            recorder.touched.setdefault(recorder.owner[id(tensor)], f'`{name}` reads its weight')
    if not isinstance(out, Tensor) or not read:
        return other
    same_shape = all(t.shape == out.shape for t in read)
    if name in _CLIPS and len(read) == 1:
        lo, hi = clip_bounds(name, args, kwargs)
        return _Operation('clip', name, inputs, [], (lo, hi)) if lo in (0, -inf) and hi > 0 else other
    if name in _SUMS and same_shape:
        # a number that is added, or a factor of one of the terms
        constants = [a for a in (*args, *kwargs.values()) if isinstance(a, int | float)]
        return _Operation('sum', name, inputs, []) if not any(constants) else other
    if (
        name in _POINTWISE
        and same_shape
        and out.is_floating_point()
        and not (name.startswith('dropout') and drops(args, kwargs))
    ):
        return _Operation('pass', name, inputs[:1], [], nonnegative=name.startswith('relu'))
    if name in _SPATIAL and out.ndim == read[0].ndim >= 3 and out.shape[:2] == read[0].shape[:2]:
        if name != 'pad' or pads_with_zero(args, kwargs):
            return _Operation('pass', name, inputs[:1], [], axis=1)
    return other


def find_junctions(detector: nn.Module, run: Callable[[], Any]) -> tuple[list[Junction], list[Skipped]]:
    """Finds the layers that may be equalized exactly.

    Args:
        detector: The float detector with its normalisations folded, in eval mode.
        run: Calls the detector on one image (``mode='predict'``); tensors it returns count as read.

    Returns:
        The junctions, and the layers whose output is not part of one although other layers come next.
    """
    layers = {name: module for name, module in detector.named_modules() if isinstance(module, QUANTIZABLE)}
    recorder = _Recorder(layers)
    with gradients_everywhere(detector), _Watch(recorder):
        result = run()
    returned = [key_of(tensor) for tensor in tensors_in(result)]
    return _Classes(recorder, returned).result()


class _Classes:
    """Union-find over tensors and over the input and output sides of layers."""

    def __init__(self, recorder: _Recorder, returned: Iterable[tuple[int, int]]) -> None:
        self.recorder = recorder
        self.parent: dict[Hashable, Hashable] = {}
        self.obstacles: list[tuple[Hashable, str]] = []
        self.bounds = _output_bounds(recorder)
        written, order = set(), {}
        for op in recorder.operations:
            if op.kind == 'layer':
                order.setdefault(op.name)
                self.join(('in', op.name), op.inputs[0])
                self.join(('out', op.name), op.outputs[0])
            elif op.kind == 'other':
                self.obstacles += [(key, f'`{op.name}` stands between') for key in op.inputs + op.outputs]
            else:
                for key in op.inputs[1:] + op.outputs:
                    self.join(op.inputs[0], key)
            self.obstacles += [
                (key, 'what it is added to or read with comes from no layer') for key in op.inputs if key not in written
            ]
            written.update(op.outputs)
        self.order = list(order)
        self.obstacles += [(key, 'the detector returns it') for key in returned]
        for name, reason in recorder.touched.items():
            self.obstacles += [(('in', name), reason), (('out', name), reason)]
        # those whose outputs no operation reads are not among the operations
        for node in _custom_functions(recorder):
            self.obstacles += [
                (key, f'`{function_name(node)}` stands between')
                for source, _ in node.next_functions
                for key in recorder.makers.get(source, ())
            ]

    def root(self, item: Hashable) -> Hashable:
        while (parent := self.parent.setdefault(item, item)) != item:
            self.parent[item] = item = self.parent[parent]
        return item

    def join(self, a: Hashable, b: Hashable) -> None:
        self.parent[self.root(b)] = self.root(a)

    def result(self) -> tuple[list[Junction], list[Skipped]]:
        reasons: dict[Hashable, str] = {}
        for item, reason in self.obstacles:
            reasons.setdefault(self.root(item), reason)
        producers, readers, axes = defaultdict(list), defaultdict(list), defaultdict(set)
        for name in self.order:
            producers[self.root(('out', name))].append(name)
            readers[self.root(('in', name))].append(name)
        for op in self.recorder.operations:
            if op.axis is not None:
                axes[self.root(op.inputs[0])].add(op.axis)
                if op.kind == 'layer':
                    axes[self.root(op.outputs[0])].add(op.axis)
        clips = defaultdict(list)
        for op in self.recorder.operations:
            if op.kind == 'clip' and op.bounds[1] < inf:
                clips[self.root(op.inputs[0])].append(op)
        junctions, next_layers, skipped = [], self._next_layers(), []
        for root, names in producers.items():
            reason = reasons.get(root) or self._disagreement(names, readers[root], axes[root])
            if not reason:
                floor, fixed = self._limits(clips[root], out_channels(self.recorder.layers[names[0]]))
                if readers[root] and not fixed.all():
                    junctions.append(Junction(tuple(names), tuple(readers[root]), floor, fixed))
                    continue
                reason = 'its upper clip may act in every channel'
            skipped += [
                Skipped(name, tuple(n for n in self.order if n in next_layers[name]), reason)
                for name in names
                if next_layers[name]
            ]
        return junctions, skipped

    def _disagreement(self, producers: list[str], readers: list[str], axes: set[int]) -> str:
        layers = self.recorder.layers
        sizes = {out_channels(layers[n]) for n in producers} | {in_channels(layers[n]) for n in readers}
        return 'the layers do not agree which axis holds the channels' if len(axes) > 1 or len(sizes) > 1 else ''

    def _limits(self, clips: list[_Operation], channels: int) -> tuple[Tensor, Tensor]:
        floor = torch.zeros(channels, dtype=torch.float64)
        fixed = torch.zeros(channels, dtype=torch.bool)
        for op in clips:
            bounds = self.bounds.get(op.inputs[0])
            if bounds is None:
                fixed[:] = True
            else:
                share = bounds[1] * _SLACK / op.bounds[1]
                fixed |= share > 1
                floor = torch.maximum(floor, share)
        return floor, fixed

    def _next_layers(self) -> dict[str, set[str]]:
        """The layers met first, in any way, after each layer."""
        after: dict[tuple[int, int], set[str]] = defaultdict(set)
        found = defaultdict(set)
        for op in reversed(self.recorder.operations):
            ahead = set().union(*(after[key] for key in op.outputs))
            if op.kind == 'layer':
                found[op.name] |= ahead
                ahead = {op.name}
            for key in op.inputs:
                after[key] |= ahead
        return found


def _custom_functions(recorder: _Recorder) -> list[Any]:
    return [node for node, _ in walk_back(recorder.makers, stop=()) if isinstance(node, BackwardCFunction)]


@torch.no_grad()
def _output_bounds(recorder: _Recorder) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Least and greatest value, by interval arithmetic, of every tensor for which they are finite.

    Per channel on axis 1, or one for all.
    """
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for op in recorder.operations:
        if op.kind == 'other' or len(op.outputs) != 1:
            continue
        given = [known.get(key) for key in op.inputs]
        bounds = None
        if op.kind == 'clip' and given[0] is not None:
            bounds = tuple(bound.clamp(*op.bounds) for bound in given[0])
        elif op.kind == 'clip' and max(map(abs, op.bounds)) < inf:
            bounds = tuple(torch.tensor([bound], dtype=torch.float64) for bound in op.bounds)
        elif None in given:
            continue
        elif op.kind == 'layer':
            bounds = _layer_bounds(recorder.layers[op.name], *given[0])
        elif op.kind == 'sum' and 'sub' not in op.name:
            bounds = sum(low for low, _ in given), sum(high for _, high in given)
        elif op.nonnegative:
            bounds = given[0][0].clamp(min=0), given[0][1].clamp(min=0)
        elif op.name.startswith('max_pool'):
            bounds = given[0]
        if bounds is not None:
            known[op.outputs[0]] = bounds
    return known


def _layer_bounds(layer: nn.Module, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    if is_transposed(layer) or isinstance(layer, nn.Linear):
        return None
    # zero padding belongs to the input
    low, high = (bound.expand(in_channels(layer)) for bound in (low.clamp(max=0), high.clamp(min=0)))
    weight = layer.weight.detach().double().cpu().flatten(2)
    weight = weight.reshape(layer.groups, -1, *weight.shape[1:])
    gain, loss = weight.clamp(min=0).sum(-1), weight.clamp(max=0).sum(-1)

    def total(a: Tensor, b: Tensor) -> Tensor:
        parts = [torch.einsum('goi,gi->go', w, x.reshape(layer.groups, -1)) for w, x in ((gain, a), (loss, b))]
        return sum(parts).flatten()

    bias = 0 if layer.bias is None else layer.bias.detach().double().cpu()
    return total(low, high) + bias, total(high, low) + bias
