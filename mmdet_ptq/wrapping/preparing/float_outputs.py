"""Whether a prepared detector still returns, in float, what it returned before; and which fold is to blame if not."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.state import quantization_mode
from mmdet_ptq.wrapping.watching.layers import QUANTIZABLE
from mmdet_ptq.wrapping.watching.probe import is_head
from mmdet_ptq.wrapping.watching.tensors import deep_copy, tensors_in

# in dB; float32 rounds at 144, which a deep network brings down to about 100
SAME, CHANGED = 80.0, 60.0
# mean square below which a difference is rounding, however small the signal
_FLOOR = 1e-14


@dataclass
class _Call:
    """What a module read and returned in one call."""

    inputs: list[Tensor]
    outputs: list[Tensor]


_Calls = dict[str, list[_Call]]


class FloatOutputs:
    """What a float detector's heads return on one image, kept to be compared after the detector was prepared.

    Args:
        detector: The float detector, in eval mode; a copy of it is kept.
        run: Calls it on one image.
    """

    def __init__(self, detector: nn.Module, run: Callable[[], Any]) -> None:
        self.original, self.run = deep_copy(detector), run
        self.given: tuple[tuple, dict] | None = None
        keeping = detector.register_forward_pre_hook(self._keep, with_kwargs=True)
        self.calls = _head_calls(detector, run)
        keeping.remove()

    def _keep(self, _, args: tuple, kwargs: dict) -> None:
        self.given = copy.deepcopy((args, kwargs))  # detectors write into the samples

    def check(self, detector: nn.Module, folds: Sequence[tuple[str, str]]) -> None:
        """Compares with what the heads return now, in float, and logs it.

        Args:
            detector: The same detector, prepared.
            folds: (convolution, normalisation) names that were folded.

        Raises:
            PTQError: The outputs differ by more than rounding; names the first pair, or layer, that differs.
        """
        after = _head_calls(detector, self.run)
        found = {
            name: min(_likeness(old.outputs, new.outputs) for old, new in zip(calls, after[name], strict=False))
            for name, calls in self.calls.items()
            if after[name]
        }
        told = ', '.join(f'{name} {_told(value)}' for name, value in found.items())
        print_log(f'float outputs before and after the preparation agree to: {told or "no head ran"}', 'current')
        if min(found.values(), default=math.inf) >= CHANGED:
            return
        changed = None if self.given is None else self._first_changed(detector, dict(folds))
        if changed is not None:
            raise PTQError(changed)
        # boxes of a first stage, or queries
        print_log(
            'the heads differ only in what they were given: rounding changed the order of regions or queries.',
            'current',
            level=logging.WARNING,
        )

    def _first_changed(self, detector: nn.Module, norm_of: dict[str, str]) -> str | None:
        """The first layer, with the normalisation it took over, that returns something else for the same input."""
        names = [name for name, module in self.original.named_modules() if isinstance(module, QUANTIZABLE)]
        with _recorded(self.original, {name: norm_of.get(name, name) for name in names}) as before:
            self._run(self.original)
        with _recorded(detector, {name: name for name in names}) as after:
            self._run(detector)
        for name, calls in before.items():
            for old, new in zip(calls, after[name], strict=False):
                value = _likeness(old.outputs, new.outputs)
                if value >= CHANGED or _likeness(old.inputs, new.inputs) < SAME:
                    continue
                what = f'preparing the layer {name}'
                if name in norm_of:
                    conv, norm = (type(self.original.get_submodule(n)).__name__ for n in (name, norm_of[name]))
                    what = f'folding {norm_of[name]} ({norm}) into {name} ({conv})'
                return (
                    f'{what} changed the float outputs of the detector: they agree to {_told(value)} only, where '
                    f'{CHANGED:.0f} dB are rounding; it does more than its class says, please report the model.'
                )
        return None

    @torch.no_grad()
    def _run(self, detector: nn.Module) -> None:
        args, kwargs = copy.deepcopy(self.given)
        detector(*args, **kwargs)


@torch.no_grad()
def _head_calls(detector: nn.Module, run: Callable[[], Any]) -> _Calls:
    heads = [name for name, module in detector.named_modules() if is_head(name, module)]
    with _recorded(detector, {name: name for name in heads}) as calls:
        run()
    return calls


def _told(decibels: float) -> str:
    return 'exactly' if decibels == math.inf else f'{decibels:.0f} dB'


def _likeness(before: list[Tensor], after: list[Tensor]) -> float:
    """Signal to noise in dB; minus infinity where the shapes differ."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return -math.inf
    signal = noise = count = 0
    for old, new in zip(before, after, strict=True):
        old, new = (t.double().nan_to_num(0, 0, 0) for t in (old, new))
        signal += old.square().sum().item()
        noise += (old - new).square().sum().item()
        count += old.numel()
    return math.inf if noise <= _FLOOR * count else 10 * math.log10(max(signal, noise * 1e-30) / noise)


@contextmanager
def _recorded(detector: nn.Module, ends: dict[str, str]) -> Iterator[_Calls]:
    """Records what modules read and return in float, and in full float32.

    Args:
        detector: The detector.
        ends: Module to the module whose output counts: itself, or the normalisation behind it.
    """
    calls, handles = defaultdict(list), []

    def floats(value: Any) -> list[Tensor]:
        # copies: what follows may work in place
        return [t.detach().clone() for t in tensors_in(value) if t.is_floating_point()]

    for name, end in ends.items():
        handles += [
            detector.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kwargs, name=name: calls[name].append(_Call(floats([args, kwargs]), [])),
                prepend=True,  # in front of what prepares the input of a quantized layer
                with_kwargs=True,
            ),
            detector.get_submodule(end).register_forward_hook(
                lambda _, args, output, name=name: calls[name][-1].outputs.extend(floats(output))
            ),
        ]
    try:
        with quantization_mode(detector, 'float'), _full_precision():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Convolutions of a GPU round to 10 bits by default, which is more than what is looked for."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
