"""Reconstruction units: the parts of a detector that are calibrated one after another, found from its module tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdet_ptq.errors import PTQError, did_you_mean
from mmdet_ptq.wrapping.watching.layers import channel_axis, matches
from mmdet_ptq.wrapping.watching.tensors import gradients_everywhere, tensors_in
from mmdet_ptq.wrapping.weights import quantized_weights

# a larger module is no block but a stage: its own children are looked at
MAX_LAYERS = 16
# how values leave tensors for Python, where nothing tells what they are used for
TO_PYTHON = {
    'item',
    'tolist',
    'numpy',
    '__array__',
    '__bool__',
    '__int__',
    '__float__',
    '__index__',
    '__complex__',
    '__contains__',
    'equal',
    'allclose',
    'is_nonzero',
}


@dataclass
class Unit:
    """A module that is calibrated as a whole.

    Attributes:
        name: Path in the detector.
        layers: Its quantized layers, in the order in which they run, and how often each runs in one call of the unit.
        calls: Calls in one forward pass (a head shared by levels has one per level).
        axis: Where the channels of its output are: -1 for linear layers and sequences of tokens, 1 for maps.
        needs: For each call, the calls (unit, index) of other units whose outputs it is computed from, with nothing
            but unweighted operations in between; None where the graph does not tell.
        rows: For each call, the first dimension of its input tensors and of its output with one image.
    """

    name: str
    layers: dict[str, int]
    calls: int
    axis: int = 1
    needs: list[set[tuple[str, int]] | None] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)


@dataclass
class Passage:
    """A module between or around units that need not run where its output does not matter.

    Attributes:
        name: Path in the detector.
        made_of: For each call, the calls (unit, index) of units whose outputs its own output is computed from, with
            nothing but unweighted operations in between.
    """

    name: str
    made_of: list[set[tuple[str, int]]]


@dataclass
class _Call:
    order: int
    nodes: list[Any] | None  # autograd nodes of the inputs; None where an input has no history
    layers: Counter = field(default_factory=Counter)
    modules: Counter = field(default_factory=Counter)  # what ran inside
    output: Any = None  # autograd node of the single output tensor
    ndim: int = 0  # of that tensor
    rows: list[int] = field(default_factory=list)  # of the tensors it takes and returns


class _History(TorchFunctionMode):
    """What tensors are made of where autograd does not tell: behind ``detach``, as indices, masks or Python numbers.

    Attributes:
        beside: Autograd node to nodes that its tensor is made of, too.
        escaped: Nodes of what Python has read: all that follows may depend on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.beside: dict[Any, set] = {}
        self.escaped: set = set()
        # storage to a tensor that keeps it alive, and the nodes; views share it
        self._hidden: dict[int, tuple[Tensor, set]] = {}

    def hidden(self, tensors: Iterable[Tensor]) -> set:
        """Nodes that the tensors are made of besides those that autograd knows."""
        return set().union(*(self._hidden[_storage(t)][1] for t in tensors if _storage(t) in self._hidden))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        versions = [t._version for t in given]
        name = getattr(func, '__name__', '')
        # of the first tensor such functions take nothing but its size and type
        sizes = name.endswith('_like') or name.startswith('new_') or name == '_shape_as_tensor'
        read = given[1:] if sizes else given
        hidden = self.hidden(read)
        nodes = hidden.union(t.grad_fn for t in read if t.grad_fn is not None)
        result = func(*args, **kwargs)
        if nodes:
            if name in TO_PYTHON:
                self.escaped |= nodes
            for tensor in tensors_in(result):
                self._add(tensor, hidden, nodes)
            for tensor, version in zip(given, versions, strict=True):
                if tensor._version != version:
                    self._add(tensor, hidden if torch.is_grad_enabled() else nodes, nodes)
                    if tensor._base is not None:
                        self._add(tensor._base, hidden, nodes)
        return result

    def _add(self, tensor: Tensor, hidden: set, nodes: set) -> None:
        if tensor.grad_fn is None:
            _, known = self._hidden.setdefault(_storage(tensor), (tensor, set()))
            known |= nodes
        elif hidden:
            self.beside.setdefault(tensor.grad_fn, set()).update(hidden)


def _rows(tensor: Tensor) -> int:
    return len(tensor) if tensor.ndim else 0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Trace:
    """Records every module call of one forward pass."""

    def __init__(self, detector: nn.Module) -> None:
        self.history = _History()
        self.calls: dict[str, list[_Call]] = {}
        self.stack: list[_Call] = []
        self.count = 0
        self.layers = quantized_weights(detector)
        self.handles = []
        for name, module in detector.named_modules():
            if name and 'parametrizations' not in name and not name.startswith('ptq'):
                self.handles += [
                    module.register_forward_pre_hook(self.enter(name), with_kwargs=True),
                    module.register_forward_hook(self.leave(name)),
                ]

    def enter(self, name: str) -> Callable:
        def hook(module, args, kwargs):
            every = list(tensors_in((args, kwargs)))
            tensors = [t for t in every if t.is_floating_point()]
            known = all(t.requires_grad for t in tensors)
            nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
            call = _Call(self.count, [*nodes, *self.history.hidden(every), *self.history.escaped] if known else None)
            call.rows = [_rows(t) for t in every]
            self.count += 1
            if not tensors:
                call.output = False
            self.calls.setdefault(name, []).append(call)
            for outer in self.stack:
                outer.modules[name] += 1
            self.stack.append(call)
            if name in self.layers:
                for outer in self.stack:
                    outer.layers[name] += 1

        return hook

    def leave(self, name: str) -> Callable:
        def hook(module, args, output):
            call = self.stack.pop()
            known = isinstance(output, Tensor) and output.grad_fn is not None
            if call.output is None:
                call.output = output.grad_fn if known else False
                call.ndim = output.ndim if known else 0
                call.rows += [_rows(output)] if known else []
            # a copy goes on: writing to a view would take its node out of the graph
            return output.clone() if known else None

        return hook


def _trace(detector: nn.Module, run: Callable[[], Any]) -> _Trace:
    """Records one run whose parameters and images require gradients, so that the graph tells what is made of what."""
    trace = _Trace(detector)
    try:
        with gradients_everywhere(detector), trace.history:
            run()
    finally:
        for handle in trace.handles:
            handle.remove()
    return trace


def find_units(
    detector: nn.Module, run: Callable[[], Any], granularity: str = 'block', patterns: Iterable[str] = ()
) -> list[Unit]:
    """Finds the units of a quantized detector.

    A block is the outermost module with a forward of its own (not a mere sequence) that takes tensors, returns one
    tensor, holds at most 16 quantized layers, and whose layers run nowhere else. What is in no block is a unit layer by
    layer.

    Args:
        detector: The quantized detector, in float mode.
        run: Runs the detector on one image that requires gradients.
        granularity: ``'block'``; ``'layer'``, where a unit has one quantized layer (and its activation function); or
            ``'paper'``: blocks in the backbone, layers elsewhere (Reg-PTQ). Defaults to ``'block'``.
        patterns: Modules that are units whatever the rule says. Defaults to none.

    Returns:
        The units in the order in which they first run.

    Raises:
        PTQError: A pattern names no module that could be a unit.
    """
    trace = _trace(detector, run)
    totals = Counter()
    for name in trace.layers:
        totals[name] = len(trace.calls.get(name, ()))
    able = {name: _as_unit(name, calls, totals) for name, calls in trace.calls.items()}
    patterns = list(patterns)
    for pattern in patterns:
        if not any(matches(pattern, name) and unit for name, unit in able.items()):
            raise PTQError(
                f'`ptq.reconstruct.units` names {pattern!r}, which is no module that takes and returns one '
                f'tensor and holds quantized layers.{did_you_mean(pattern, able)}'
            )
    chosen: dict[str, Unit] = {}
    _choose(detector, '', able, granularity, patterns, chosen, set())
    units = sorted(chosen.values(), key=lambda unit: trace.calls[unit.name][0].order)
    for unit in units:
        unit.axis = _channel_axis(detector, unit, trace.calls[unit.name][0].ndim)
        unit.rows = [call.rows for call in trace.calls[unit.name]]
    _find_needs(units, trace)
    return units


def find_passages(detector: nn.Module, run: Callable[[], Any], units: list[Unit]) -> list[Passage]:
    """Finds the modules that may be left out, besides the units, where nobody asks for what they return.

    Such a module returns one tensor, lies in no unit, and what is in it runs nowhere else.

    Args:
        detector: As for :func:`find_units`.
        run: As for :func:`find_units`.
        units: What that returned.
    """
    trace, names = _trace(detector, run), {unit.name for unit in units}
    outputs = _outputs(units, trace)
    return [
        Passage(name, [_reached([call.output], outputs, trace) for call in calls])
        for name, calls in trace.calls.items()
        if not _inside(name, names) and _is_passage(calls, trace)
    ]


def _inside(name: str, units: set[str]) -> bool:
    parts = name.split('.')
    return any('.'.join(parts[:count]) in units for count in range(1, len(parts) + 1))


def _is_passage(calls: list[_Call], trace: _Trace) -> bool:
    if any(call.output is False or call.output is None for call in calls):
        return False
    return all(
        len(calls) == 1 and len(trace.calls[name]) == count for call in calls for name, count in call.modules.items()
    )


def _as_unit(name: str, calls: list[_Call], totals: Counter) -> Unit | None:
    layers = calls[0].layers
    if not layers or any(call.output is False or call.layers != layers for call in calls):
        return None
    # a layer that also runs elsewhere belongs to no module alone
    if any(totals[layer] != count * len(calls) for layer, count in layers.items()):
        return None
    return Unit(name, dict(layers), len(calls))


def _choose(
    module: nn.Module,
    name: str,
    able: dict[str, Unit | None],
    granularity: str,
    patterns: list[str],
    chosen: dict[str, Unit],
    seen: set[int],
) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    unit = able.get(name)
    if unit is not None:
        as_layers = granularity == 'layer' or granularity == 'paper' and not name.startswith('backbone')
        sequence = type(module).forward is nn.Sequential.forward
        fits = not sequence and len(unit.layers) <= (1 if as_layers else MAX_LAYERS)
        if fits or name in unit.layers or any(matches(pattern, name) for pattern in patterns):
            chosen[name] = unit
            return
    for child_name, child in module.named_children():
        _choose(child, f'{name}.{child_name}' if name else child_name, able, granularity, patterns, chosen, seen)


def _channel_axis(detector: nn.Module, unit: Unit, ndim: int) -> int:
    last = detector.get_submodule(list(unit.layers)[-1])
    tokens = ndim == 3 and unit.name not in unit.layers  # what a transformer's block returns, whatever ran last in it
    return -1 if tokens else channel_axis(last)


def _find_needs(units: list[Unit], trace: _Trace) -> None:
    outputs = _outputs(units, trace)
    for unit in units:
        unit.needs = [
            None if call.nodes is None else _reached(call.nodes, outputs, trace) for call in trace.calls[unit.name]
        ]


def _outputs(units: list[Unit], trace: _Trace) -> dict[Any, tuple[str, int]]:
    return {call.output: (unit.name, i) for unit in units for i, call in enumerate(trace.calls[unit.name])}


def _reached(nodes: list[Any], outputs: dict[Any, tuple[str, int]], trace: _Trace) -> set[tuple[str, int]]:
    """The unit calls met first when walking the graph back."""
    found, seen, todo = set(), set(), list(nodes)
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in outputs:
            found.add(outputs[node])
        else:
            todo += [parent for parent, _ in node.next_functions]
            todo += trace.history.beside.get(node, ())
    return found
