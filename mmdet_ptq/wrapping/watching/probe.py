"""One probing forward pass: which layer runs when, what it reads, how much it costs.

No code is traced or rewritten. Forward hooks record the identity of every layer's input; a
``TorchFunctionMode`` sees the functional calls, so a weight that never reaches an operation as it is (weight
standardisation, attention's in-projection, weights generated per image) is found instead of guessed; the autograd
graph of the same pass tells which layers read the image and which ones write the head's outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from mmdet_ptq.wrapping.watching.layers import QUANTIZABLE
from mmdet_ptq.wrapping.watching.tensors import (
    METADATA,
    WEIGHTED_FUNCTIONS,
    gradients_everywhere,
    key_of,
    tensors_in,
    walk_back,
)

PRODUCT_OF_ACTIVATIONS = 'activation x activation product'  # why it stays float
_PRODUCTS = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.bmm,
    Tensor.bmm,
    torch.mm,
    Tensor.mm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.addmm,
    Tensor.addmm,
    torch.einsum,
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
}


@dataclass
class LayerCall:
    """One call of a quantizable layer: its input tensor's identity and its multiply-accumulates."""

    layer: str
    index: int
    input_key: tuple[int, int]
    macs: int = 0
    reads_image: bool = False


@dataclass
class Uncovered:
    """A weighted operation that no quantized layer stands for."""

    module: str
    operation: str
    reason: str
    macs: int


@dataclass
class Probe:
    """What one forward pass showed.

    Attributes:
        calls: Every call of a quantizable layer, in order.
        direct: Names of layers whose own weight tensor reached an operation unchanged.
        outputs: Names of the layers that write the heads' outputs (no other layer comes after them).
        norms: (layer, normalisation) name pairs, one per call, of normalisations that only ever normalise the output
            channels of a layer that nothing else reads.
        borrowed: Ids of tensors, parameters and buffers among them, that an operation outside their own module read.
        uncovered: Weighted operations outside quantizable layers.
        image_macs: Multiply-accumulates of the whole pass.
    """

    calls: list[LayerCall] = field(default_factory=list)
    direct: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)
    norms: list[tuple[str, str]] = field(default_factory=list)
    borrowed: set[int] = field(default_factory=set)
    uncovered: list[Uncovered] = field(default_factory=list)

    @property
    def image_macs(self) -> int:
        return sum(c.macs for c in self.calls) + sum(u.macs for u in self.uncovered)


def head_names(detector: nn.Module) -> list[str]:
    """Names of the outermost modules that predict: bbox_head, rpn_head, roi_head, mask_head, ...

    A wrapper's detectors have theirs (``teacher.rpn_head``); what a backbone or neck calls a head is none.
    """
    found = []
    for name, child in detector.named_children():
        if name.endswith('head'):
            found.append(name)
        elif not name.endswith(('backbone', 'neck')):
            found += [f'{name}.{inner}' for inner in head_names(child)]
    return found


def part_of(layer: str, heads: Sequence[str]) -> str:
    """The part of the detector that a layer belongs to: backbone, neck, bbox_head, ..., teacher.backbone, ...

    Args:
        layer: Its name.
        heads: See :func:`head_names`.
    """
    owners = sorted({head.rpartition('.')[0] for head in heads}, key=len)
    owner = next((owner for owner in reversed(owners) if layer.startswith(f'{owner}.')), '')
    prefix = f'{owner}.' if owner else ''
    return prefix + layer.removeprefix(prefix).split('.')[0]


def is_head(name: str, module: nn.Module) -> bool:
    """Whether a module is named as a head, or its class is: also one within another."""
    return name.endswith('head') or type(module).__name__.endswith('Head')


class _Operations(TorchFunctionMode):
    """Counts multiply-accumulates of functional calls and sees which tensors they read, and take as weights."""

    def __init__(self, prober: _Prober) -> None:
        super().__init__()
        self.prober = prober

    def __torch_function__(self, func, types, args=(), kwargs=None):
        read = {id(t): t.grad_fn for t in tensors_in([args, kwargs])}  # an in-place function changes the node
        out = self.call(func, args, kwargs or {})
        self.prober.read(func, read, out)
        return out

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in _PRODUCTS:
            with FlopCounterMode(display=False) as counter:
                out = func(*args, **kwargs)
            self.prober.product(func, args, counter.get_total_flops() // 2)
            return out
        out = func(*args, **kwargs)
        if func in WEIGHTED_FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs['weight']
            source = args[0] if args else kwargs['input']
            transposed = 'transpose' in func.__name__
            macs = (source.numel() if transposed else out.numel()) * prod(weight.shape[1:])
            self.prober.weighted(func.__name__, weight, macs)
        return out


class _Prober:
    def __init__(self, detector: nn.Module) -> None:
        self.probe = Probe()
        self.alive: list[Any] = []  # keeps every tensor, so that an id is never used twice
        self.stack: list[tuple[str, nn.Module]] = []
        self.counts: dict[str, int] = {}
        self.open: list[LayerCall] = []
        self.nodes: dict[Any, str] = {}  # autograd node of a layer's output -> layer
        self.produced: dict[tuple[int, int], tuple[str, Any]] = {}
        self.norm_calls: Counter[str] = Counter()
        self.images: set[Any] = set()  # autograd nodes of what the detector was given
        self.from_images: list[LayerCall] = []
        self.head_outputs: list[Tensor] = []
        self.module_outputs: list[Tensor] = []
        self.norm_inputs: list[tuple[str, str, Any]] = []
        self.reads: Counter[Any] = Counter()  # of layers' outputs, by their nodes
        norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.of_norms = {key for norm in norms for key in _own(norm)}
        self.heads = set(head_names(detector))
        self.handles = []
        self.handles.append(detector.register_forward_pre_hook(self.mark_image, with_kwargs=True))
        for name, module in detector.named_modules():
            self.handles += [
                module.register_forward_pre_hook(self.enter(name), with_kwargs=True),
                module.register_forward_hook(self.leave(name), always_call=True),
            ]

    def mark_image(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Lets the autograd graph tell what is computed from the image and what from learned queries and positions."""
        image = next(tensors_in([args, kwargs]), None)
        if image is None or not image.is_floating_point():
            return None
        # not a leaf: the detector may write to it
        marked = image.detach().requires_grad_().clone()
        self.alive.append(marked)
        self.images.add(marked.grad_fn)
        return tree_map(lambda leaf: marked if leaf is image else leaf, (args, kwargs))

    def enter(self, name: str) -> Callable:
        def hook(module, args, kwargs):
            self.stack.append((name, module))
            source = next(tensors_in([args, kwargs]), None)
            if source is None:
                return
            if isinstance(module, QUANTIZABLE):
                self.alive.append(source)
                index = self.counts[name] = self.counts.get(name, -1) + 1
                call = LayerCall(name, index, key_of(source), reads_image=not _has_layer(source, self))
                if call.reads_image and any(node in self.images for node, _ in walk_back([source], stop=())):
                    self.from_images.append(call)
                self.probe.calls.append(call)
                self.open.append(call)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                self.norm_calls[name] += 1
                producer = self.produced.get(key_of(source))
                if producer is not None:
                    self.norm_inputs.append((producer[0], name, producer[1]))

        return hook

    def leave(self, name: str) -> Callable:
        def hook(module, args, output):
            while self.stack and self.stack.pop()[0] != name:
                pass
            outputs = [t for t in tensors_in(output) if t.grad_fn is not None]
            self.module_outputs += outputs
            if not name:  # the caller's
                self.reads.update({t.grad_fn for t in outputs} & self.nodes.keys())
            if isinstance(module, QUANTIZABLE) and isinstance(output, Tensor):
                self.alive.append(output)
                self.open.pop()
                if output.grad_fn is not None:
                    self.nodes[output.grad_fn] = name
                # tokens have their channels last, an image without its batch axis has them first
                if output.ndim == (2 if isinstance(module, nn.Linear) else module.weight.ndim):
                    self.produced[key_of(output)] = (name, output.grad_fn)
            elif type(module).__name__ in _CUSTOM_WEIGHTED and isinstance(output, Tensor):
                self.probe.uncovered.append(
                    Uncovered(
                        name,
                        type(module).__name__,
                        'samples its input off the grid',
                        output.numel() * prod(module.weight.shape[1:]),
                    )
                )
            elif name in self.heads or is_head('', module):
                self.head_outputs += outputs

        return hook

    def read(self, func: Callable, read: dict[int, Any], out: Any) -> None:
        """Notes which layers' outputs a call read, and which tensors of another module than the one that runs.

        Args:
            func: The function.
            read: Ids and autograd nodes of the tensors that it was given.
            out: What it returned.
        """
        name = getattr(func, '__name__', '')
        others = read.keys() - (_own(self.stack[-1][1]) if self.stack else set())
        if name in METADATA or (name == '__get__' and not isinstance(out, Tensor)):
            self.probe.borrowed |= others & self.of_norms  # once folded, a norm has not even a shape
            return
        self.probe.borrowed |= others
        # what a call hands on as it is, as `contiguous` may, is left to those who read it then
        self.reads.update(set(read.values()) & self.nodes.keys() - {t.grad_fn for t in tensors_in(out)})

    def weighted(self, operation: str, weight: Tensor, macs: int) -> None:
        name, module = self.stack[-1] if self.stack else ('', None)
        if isinstance(module, QUANTIZABLE) and weight is module._parameters.get('weight'):
            self.probe.direct.add(name)
        if isinstance(module, QUANTIZABLE):
            self.open[-1].macs += macs
        else:
            reason = (
                'a parameter of a module that is no layer'
                if isinstance(weight, nn.Parameter)
                else 'its weight is computed in the forward pass'
            )
            self.probe.uncovered.append(Uncovered(name, operation, reason, macs))

    def product(self, operation: Callable, operands: tuple, macs: int) -> None:
        name = self.stack[-1][0] if self.stack else ''
        if operation is F.multi_head_attention_forward:
            reason = 'projections and products of attention run in one fused function'
        elif any(isinstance(t, nn.Parameter) for t in operands):
            reason = 'a parameter of a module that is no layer'
        else:
            reason = PRODUCT_OF_ACTIVATIONS
        if macs:
            self.probe.uncovered.append(Uncovered(name, operation.__name__, reason, macs))

    def finish(self) -> Probe:
        for handle in self.handles:
            handle.remove()
        self.probe.outputs = _last_layers(self.head_outputs, self.nodes)
        if self.from_images:  # none where only a part of the detector ran
            for call in self.probe.calls:
                call.reads_image = any(call is other for other in self.from_images)
        readers = _reader_counts(self.module_outputs)
        # the graph shows readers with a kernel of their own; the calls show those that no gradient passes
        alone = [(conv, norm) for conv, norm, node in self.norm_inputs if readers[node] == self.reads[node] == 1]
        normalised = Counter(conv for conv, _ in alone)
        normalising = Counter(norm for _, norm in alone)
        # a convolution that also runs without its normalisation keeps it, and so does one whose normalisation does more
        self.probe.norms = [
            (conv, norm)
            for conv, norm in alone
            if normalised[conv] == self.counts[conv] + 1 and normalising[norm] == self.norm_calls[norm]
        ]
        return self.probe


# Convolutions of mmcv that call a compiled operator of their own.
_CUSTOM_WEIGHTED = {
    'DeformConv2d',
    'DeformConv2dPack',
    'ModulatedDeformConv2d',
    'ModulatedDeformConv2dPack',
    'MaskedConv2d',
}


def _own(module: nn.Module) -> set[int]:
    """Ids of the parameters and buffers that a module itself holds."""
    return {id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())}


def _has_layer(tensor: Tensor, prober: _Prober) -> bool:
    """Whether any quantizable layer lies upstream (walks the autograd graph back)."""
    return tensor.grad_fn is not None and bool(_last_layers([tensor], prober.nodes))


def _last_layers(tensors: list[Tensor], nodes: dict[Any, str]) -> set[str]:
    """The first layers met when walking back from the tensors."""
    return {nodes[node] for node, _ in walk_back(tensors, stop=nodes) if node in nodes}


def _reader_counts(tensors: list[Tensor]) -> Counter:
    """How many graph nodes read each node's output, over everything the tensors depend on."""
    return Counter(parent for _, parents in walk_back(tensors, stop=()) for parent in parents)


def probe_detector(detector: nn.Module, run: Callable[[], Any]) -> Probe:
    """Runs the detector once and records its layers.

    Args:
        detector: Any mmdet detector, in eval mode.
        run: Calls the detector on one image (``mode='predict'``); its result is ignored.

    Returns:
        What the pass showed.
    """
    prober = _Prober(detector)
    try:
        with gradients_everywhere(detector), _Operations(prober):
            run()
        return prober.finish()
    finally:
        for handle in prober.handles:
            handle.remove()
