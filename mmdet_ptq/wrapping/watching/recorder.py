"""One float forward pass, operation by operation: which layer or function reads and writes which tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mmdet_ptq.wrapping.watching.frames import Frames
from mmdet_ptq.wrapping.watching.layers import QUANTIZABLE
from mmdet_ptq.wrapping.watching.operations import (
    JOINS,
    LAYER,
    MATRIX_PRODUCTS,
    MOVEMENT,
    UNKNOWN,
    classify,
    clips_at_zero,
    is_positive,
    works_in_place,
)
from mmdet_ptq.wrapping.watching.tensors import (
    METADATA,
    function_name,
    gradients_everywhere,
    key_of,
    matrices,
    tensors_in,
)

Key = tuple[int, int]


@dataclass(eq=False)
class Operation:
    """One layer call or functional call.

    Attributes:
        kind: ``'layer'``, ``'movement'``, ``'arithmetic'`` or ``'unknown'``.
        name: The layer's path, or the function's name.
        place: Module, call, function, index as in :class:`mmdet_ptq.wrapping.flow.Site`; for a layer its path, call.
        inputs: Floating-point tensors it reads.
        outputs: Tensors it writes.
        clips: It is max(x, 0), perhaps clipped above, too.
        in_place: It overwrites its first input; who goes on with the result takes what it returns.
        overwrites: It changes a tensor in place that is read under its old name later.
        positive: None of its values is below zero.
        macs: Multiply-accumulates of a product of matrices; 0 of anything else.
        pair: It has two tensors of numbers, one behind the other.
    """

    kind: str
    name: str
    place: tuple
    inputs: list[Key]
    outputs: list[Key]
    clips: bool = False
    in_place: bool = False
    overwrites: bool = False
    positive: bool = False
    macs: int = 0
    pair: bool = False

    @property
    def joins(self) -> bool:
        return self.kind == MOVEMENT and self.name in JOINS and len(set(self.inputs)) > 1


@dataclass
class Recorder:
    """Everything one forward pass did, in order."""

    operations: list[Operation] = field(default_factory=list)
    frames: Frames = field(default_factory=Frames)
    called: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # function -> modules
    alive: list[Tensor] = field(default_factory=list)  # so that an id is never used twice
    written: set[Key] = field(default_factory=set)
    overwritten: list[tuple[Operation, Key]] = field(default_factory=list)  # in place, and not the result
    makers: dict[Any, list[Key]] = field(default_factory=lambda: defaultdict(list))  # autograd node -> tensors

    def add(self, operation: Operation) -> None:
        self.operations.append(operation)
        self.written.update(operation.outputs)

    def keep(self, tensor: Tensor) -> Key:
        self.alive.append(tensor)
        key = key_of(tensor)
        if tensor.grad_fn is not None:
            self.makers[tensor.grad_fn].append(key)
        return key

    def read(self, tensor: Tensor) -> Key:
        key, node = self.keep(tensor), tensor.grad_fn
        if key not in self.written and isinstance(node, BackwardCFunction):
            # a function with a kernel of its own is not seen while it runs, only in the graph it leaves
            inputs = [k for source, _ in node.next_functions for k in self.makers.get(source, ())]
            module = self.frames.top.module if self.frames.top else ''
            self.add(Operation(UNKNOWN, function_name(node), (module, 0, function_name(node), 0), inputs, [key]))
        return key

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        name, frame = getattr(func, '__name__', str(func)), self.frames.top
        if frame is None or name in METADATA or name in ('__set__', 'requires_grad_'):
            return func(*args, **kwargs)
        read = [t for t in tensors_in([args, kwargs]) if t.is_floating_point()]
        inputs = [self.read(t) for t in read]  # before an in-place function raises the version
        kind = classify(func, name, args, kwargs)
        place = frame.next(name)
        macs = 0
        if name in MATRIX_PRODUCTS:
            with FlopCounterMode(display=False) as counter:
                out = func(*args, **kwargs)
            macs = counter.get_total_flops() // 2
        else:
            out = func(*args, **kwargs)
        changed = [t for t, key in zip(read, inputs, strict=True) if key_of(t) != key]
        if name == '__get__' and not isinstance(out, Tensor):
            return out
        self.called[name].add(frame.module)
        if works_in_place(name, kwargs) and isinstance(out, Tensor) and changed == [out]:
            # another object for the result: who goes on with the changed argument is told from who takes the result
            out = out.view_as(out)
        returned = [self.keep(t) for t in tensors_in(out) if t.is_floating_point()]
        # what it hands on as it is, as `contiguous` may, it did not compute: else it would read its own result
        outputs = [key for key in returned if key not in inputs and key not in self.written]
        if returned and not outputs and not changed:
            return out
        in_place = works_in_place(name, kwargs) and bool(changed)
        operation = Operation(
            kind,
            name,
            place,
            inputs,
            outputs,
            clips=clips_at_zero(name, args, kwargs),
            in_place=in_place,
            positive=is_positive(name, args, kwargs),
            macs=macs,
            pair=len(read) == len(matrices(args)) == 2,
        )
        self.add(operation)
        for tensor in changed:
            if (key := self.keep(tensor)) not in outputs:
                self.overwritten.append((operation, key))
                self.written.add(key)
        return out

    def finish(self) -> None:
        """What goes on under its old name after it was changed in place cannot be quantized."""
        read = {key for operation in self.operations for key in operation.inputs}
        for operation, key in self.overwritten:
            if key in read:
                operation.kind, operation.overwrites = UNKNOWN, True
                operation.outputs.append(key)


class _Watch(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.recorder.run(func, args, kwargs or {})


def record_operations(detector: nn.Module, run: Callable[[], Any]) -> Recorder:
    """Watches one forward pass.

    Args:
        detector: The float detector with its normalisations folded, in eval mode.
        run: Calls the detector on one image with ``mode='predict'``.
    """
    recorder, handles, open_layers = Recorder(), [], []
    frames = recorder.frames

    def enter(name: str, layer: bool) -> Callable:
        def hook(module, args, kwargs):
            if layer:
                source = next((t for t in tensors_in([args, kwargs]) if t.is_floating_point()), None)
                place = name, frames.calls[name]
                frames.calls[name] += 1
                open_layers.append((place, [] if source is None else [recorder.read(source)]))
                frames.mute()
            else:
                frames.enter(name)

        return hook

    def leave(layer: bool) -> Callable:
        def hook(module, args, output):
            frames.leave()
            if layer:
                place, inputs = open_layers.pop()
                recorder.add(Operation(LAYER, place[0], place, inputs, [recorder.keep(t) for t in tensors_in(output)]))

        return hook

    try:
        for name, module in detector.named_modules():
            layer = isinstance(module, QUANTIZABLE)
            handles += [
                module.register_forward_pre_hook(enter(name, layer), with_kwargs=True),
                module.register_forward_hook(leave(layer)),
            ]
        with gradients_everywhere(detector), _Watch(recorder):
            run()
        recorder.finish()
        return recorder
    finally:
        for handle in handles:
            handle.remove()
