"""A pretend accelerator: memory and arithmetic of the CPU, the manners of a GPU.

Its tensors are real torch tensors on a device named ``pretend`` (torch's ``PrivateUse1`` backend), whose memory is the
CPU's: DLPack hands a buffer over without a copy, and the device written in the capsule is changed on the way. Every
operator runs the CPU's kernel on the same memory, after the checks CUDA makes; so results equal the CPU's, while a
tensor or generator on the wrong device, or a missing ``.cpu()`` before numpy, raises as on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = 'pretend'
# DLPack's numbers; the device stands after the data pointer
_CPU, _EXTENSION, _DEVICE_FIELD = 1, 12, 8
# they move data between devices
_COPIES = ('aten::copy_', 'aten::_copy_from')
# CUDA takes indices from the CPU
_INDEXING = ('aten::index', 'aten::index_put_', 'aten::index_put', 'aten::_index_put_impl_', 'aten::_unsafe_index')
# besides pointwise operators, they take a number as a tensor on the CPU
_NUMBERS = ('aten::fill_', 'aten::masked_fill', 'aten::masked_fill_', 'aten::index_fill', 'aten::index_fill_')
# torch asks an accelerator for kernels of its own for these instead of the usual ones
_OWN_KERNELS = ('convolution', 'convolution_backward')
_PLAIN = (int, float, bool, type(None), torch.dtype)

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_cpu_kernels = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_libraries: list[torch.library.Library] = []


class _Device(torch._C._acc.PrivateUse1Hooks):
    """What torch asks of a backend, in C++ and as ``torch.pretend``."""

    active = False

    def is_available(self) -> bool:
        return _Device.active

    def device_count(self) -> int:
        return int(_Device.active)

    def is_initialized(self, index: int = 0) -> bool:
        return True

    is_built = has_primary_context = is_initialized
    current_device, _is_in_bad_fork = staticmethod(lambda: 0), staticmethod(lambda: False)
    # random numbers come from the CPU's generator, so that results can be compared
    manual_seed_all = staticmethod(torch.default_generator.manual_seed)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """The pretend accelerator, available inside the context only."""
    if not _libraries:
        backend = _Device()
        _setup_privateuseone_for_python_backend(NAME, backend, backend)
        everything, aten = torch.library.Library('_', 'IMPL'), torch.library.Library('aten', 'IMPL')
        everything.fallback(_run, 'PrivateUse1')
        for name in _OWN_KERNELS:
            aten.impl(name, functools.partial(_run, getattr(torch.ops.aten, name).default), 'PrivateUse1')
        _libraries.extend((everything, aten))
    _Device.active = True
    try:
        # torch starts its backward threads once, maybe before this device was known
        with (
            torch.autograd.set_multithreading_enabled(False),
            mock.patch.object(torch.UntypedStorage, 'clone', lambda storage: _moved(storage, storage.device)),
            mock.patch.object(torch.UntypedStorage, 'to', _moved),
        ):
            yield torch.device(NAME, 0)
    finally:
        _Device.active = False


def compiled(function: Callable) -> Callable:
    """Makes a compiled operator that knows only the CPU work on the pretend device, with the same checks."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        pretend, strangers = [], []
        on_cpu = _map(_splitter(pretend, strangers), (args, kwargs))
        if not pretend:
            return function(*args, **kwargs)
        _refuse(strangers, function.__name__)
        return _map(_on_pretend, function(*on_cpu[0], **on_cpu[1]))

    return call


class _Operator:
    """What an operator's schema tells about it."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        schema = op._schema
        self.name = schema.name
        returned = [r.alias_info for r in schema.returns if r.alias_info is not None]
        # views look at sizes and strides only: the CPU's kernels do, and share the storage
        self.is_view = any(not alias.is_write for alias in returned) or self.name == 'aten::set_'
        written = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        self.returned = written[: len(returned)]
        self.outs = [a.name for a in schema.arguments if a.is_out]
        self.takes_numbers = torch.Tag.pointwise in op.tags or self.name in _NUMBERS or self.name in _INDEXING


_operator = functools.cache(_Operator)


def _run(op: torch._ops.OpOverload, *args, **kwargs) -> Any:
    """Runs an operator of which an argument, or the result, is on the pretend device."""
    operator = _operator(op)
    if operator.is_view:
        return op.redispatch(_cpu_kernels, *args, **kwargs)
    strangers = []
    cpu_args, cpu_kwargs = _map(_splitter([], strangers), (args, kwargs))
    _refuse(_mistakes(operator, args, strangers), operator.name)
    generator = kwargs.get('generator')
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    if operator.name == 'aten::_copy_from':
        cpu_args[1].copy_(cpu_args[0])
        return args[1]
    if 'device' in kwargs:
        cpu_kwargs.update(device=torch.device('cpu'), pin_memory=False)
    for name in (name for name in operator.outs if not kwargs[name].numel()):
        # torch does not know the size and has the tensor resized; this memory cannot grow
        cpu_kwargs[name] = torch.empty(0, dtype=kwargs[name].dtype)
    result = op(*cpu_args, **cpu_kwargs)
    for name in operator.outs:
        if cpu_kwargs[name].shape != kwargs[name].shape:
            kwargs[name].set_(_on_pretend(cpu_kwargs[name]))
    if operator.returned:
        written = tuple(kwargs[name] if name in kwargs else args[i] for i, name in operator.returned)
        return written if len(written) > 1 else written[0]
    return _map(_on_pretend, result)


def _mistakes(operator: _Operator, args: tuple, strangers: list[Tensor]) -> list[Tensor]:
    """The tensors on the CPU that CUDA would refuse."""
    if not strangers or operator.name in _COPIES:
        return []
    if operator.takes_numbers:
        strangers = [t for t in strangers if t.dim()]
    if operator.name in _INDEXING:
        indices = {id(index) for index in args[1]}
        strangers = [t for t in strangers if id(t) not in indices]
    return strangers


def _refuse(strangers: list[Tensor], name: str) -> None:
    if strangers:
        raise RuntimeError(
            'Expected all tensors to be on the same device, but found at least two devices, '
            f'{NAME}:0 and {strangers[0].device}! (when checking arguments of {name})'
        )


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Arguments or results of an operator with other tensors."""
    kind = type(value)
    # in this order because isinstance is slow for tensors
    if kind is Tensor:
        return function(value)
    if kind in (tuple, list):
        return kind([_map(function, item) for item in value])
    if kind is dict:
        return {key: _map(function, item) for key, item in value.items()}
    return function(value) if kind not in _PLAIN and isinstance(value, Tensor) else value


def _splitter(pretend: list[Tensor], strangers: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that puts tensors on the CPU, and notes which were there."""

    def on_cpu(tensor: Tensor) -> Tensor:
        if tensor.is_cpu:
            strangers.append(tensor)
            return tensor
        pretend.append(tensor)
        return _relabel(tensor, _CPU)

    return on_cpu


def _relabel(tensor: Tensor, device: int) -> Tensor:
    """The same memory as a tensor of another device."""
    # detached: the capsule keeps this tensor, and the given one may get other memory later
    capsule = torch._C._to_dlpack(tensor.detach())
    ctypes.c_int32.from_address(_pointer(capsule, b'dltensor') + _DEVICE_FIELD).value = device
    return torch._C._from_dlpack(capsule)


_on_pretend = functools.partial(_relabel, device=_EXTENSION)


def _moved(storage: torch.UntypedStorage, device: torch.device, non_blocking: bool = False) -> torch.UntypedStorage:
    """A copy of a storage; torch would ask for an allocator, which needs C++."""
    content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return content.to(device, copy=True).untyped_storage()
