"""Tensors of a forward pass: found in nested arguments, told apart, followed back through autograd."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

WEIGHTED_FUNCTIONS = {
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.linear,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}


def key_of(tensor: Tensor) -> tuple[int, int]:
    """Tells a tensor, at one moment of its life, from all others that are alive."""
    # in-place operations keep the object and raise its version
    return id(tensor), tensor._version


def own_copy(tensor: Tensor) -> Tensor:
    """A copy whose gradient can be asked for, be it of something that no gradient leads to, as learned queries are."""
    copied = tensor.clone()
    if torch.is_grad_enabled() and copied.is_floating_point() and not copied.requires_grad:
        copied.requires_grad_()
    return copied


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor))


def matrices(args: tuple) -> list[int]:
    """The places of the floating-point tensors among the arguments of a product of matrices."""
    return [place for place, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]


@contextmanager
def gradients_everywhere(detector: nn.Module) -> Iterator[None]:
    """Runs a block of code in which every parameter takes part, so that autograd's graph tells what is made of what."""
    frozen = [p for p in detector.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), _AsWithoutGradients():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        detach_computed(detector)


class _AsWithoutGradients(TorchFunctionMode):
    """Lets code that was written for passes without gradients do what autograd forbids."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _TO_NUMPY:
            return func(args[0].detach(), *args[1:], **kwargs)
        out = kwargs.get('out')
        if out is not None and any(tensor.requires_grad for tensor in tensors_in([args, kwargs])):
            return _write(out, func(*args, **{key: value for key, value in kwargs.items() if key != 'out'}))
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            # a constant into one of several views, as into a chunk of regions
            constant = func is Tensor.__setitem__ and not getattr(args[2], 'requires_grad', False)
            if not constant or 'multiple views' not in str(error):
                raise
            return func(args[0].data, *args[1:])  # of which autograd counts no versions


_TO_NUMPY = {Tensor.numpy, Tensor.__array__}


def _write(out: Tensor | tuple[Tensor, ...], result: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """What ``out=`` does, in a way that autograd follows."""
    if not isinstance(result, Tensor):
        for place, values in zip(out, result, strict=True):
            _write(place, values)
        return result
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def detach_computed(detector: nn.Module) -> None:
    """Cuts tensors that modules keep from the graph they were computed in.

    Hooks leave them there (``torch.nn.utils.prune``, ``weight_norm``) and compute them anew in the next pass.
    """
    for module in detector.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def deep_copy(detector: nn.Module) -> nn.Module:
    """A deep copy, also of a detector whose modules keep tensors that torch does not copy: those of a graph."""
    kept = [
        tensor for module in detector.modules() for tensor in tensors_in(vars(module)) if tensor.grad_fn is not None
    ]
    return copy.deepcopy(detector, {id(tensor): tensor.detach().clone() for tensor in kept})


def walk_back(starts: Iterable[Any], stop: Container) -> Iterator[tuple[Any, list]]:
    """Every autograd node that tensors, or nodes, depend on, with the nodes it reads.

    Args:
        starts: Tensors or nodes.
        stop: Nodes beyond which the walk does not go.
    """
    seen = set()
    todo = [start.grad_fn if isinstance(start, Tensor) else start for start in starts]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        yield node, parents
        if node not in stop:
            todo += parents


# no value is read
METADATA = {
    'size',
    'dim',
    'ndimension',
    'numel',
    'stride',
    'is_contiguous',
    '__len__',
    'element_size',
    'get_device',
    'is_floating_point',
    'is_complex',
    '__hash__',
    'new_zeros',
    'new_ones',
    'new_full',
    'new_empty',
    'new_tensor',
    'zeros_like',
    'ones_like',
    'empty_like',
    'full_like',
}


def function_name(node: BackwardCFunction) -> str:
    """Name of the function of a user's own that left a node."""
    return type(node).__name__.removesuffix('Backward')
