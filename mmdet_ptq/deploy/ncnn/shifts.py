"""Zero points for ncnn, which has none: tensors are shifted before an int8 layer rounds them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from mmdet_ptq.deploy.ncnn.format import FLOAT_MAX, NcnnLayer, array, floats
from mmdet_ptq.quantizers import Quantizer

# ncnn's codes are -MIDDLE + 1 .. MIDDLE - 1
MIDDLE = 128
_ADD, _SUBTRACT_FROM = '0', '7'  # operators of BinaryOp
_PREFIX = 'shifts_'  # of a name, which so is no name of a layer's call


@dataclass(frozen=True)
class Shift:
    """What stands for x is ``sign * x + zero * scale``, which ncnn rounds to codes without a zero point.

    Attributes:
        sign: 1; or -1, which gives zero a code that is not negative: on x86 ncnn pads packed channels with 0xFF where
            the code is negative.
        zero: The code of zero.
    """

    sign: int = 1
    zero: int = 0

    def __bool__(self) -> bool:
        return self.zero != 0


def shift_of(quantizer: Quantizer) -> Shift:
    """The shift that a quantizer needs: none where its levels (code minus zero point) are codes of ncnn."""
    zero = int(quantizer.zero_point.flatten()[0])
    first, last = (code - zero for code in quantizer.code_range)
    if quantizer.bits > 8 or max(-first, last) < MIDDLE:
        return Shift()
    return Shift(1, zero - MIDDLE) if zero >= MIDDLE else Shift(-1, MIDDLE - zero)


def shift_layer(call: str, bottoms: list[str], shift: Shift, scale: float) -> NcnnLayer:
    """The layer that shifts what a call reads."""
    name = f'{_PREFIX}{call}'
    operator = _ADD if shift.sign > 0 else _SUBTRACT_FROM
    return NcnnLayer('BinaryOp', name, bottoms, [name], {0: operator, 1: '1', 2: f'{shift.zero * scale:.9e}'})


def unshift_layers(call: str, bottoms: list[str], shift: Shift) -> list[NcnnLayer]:
    """The layer that makes levels (code minus zero point) of a call's codes, where those are shifted."""
    if not shift:
        return []
    operator, number = (_ADD, -shift.zero) if shift.sign > 0 else (_SUBTRACT_FROM, shift.zero)
    name = f'{call}_levels'
    return [NcnnLayer('BinaryOp', name, bottoms, [name], {0: operator, 1: '1', 2: f'{number:.1f}'})]


def share_shifts(layers: list[NcnnLayer]) -> list[NcnnLayer]:
    """Shifts a tensor once for all of its readers that want the same of it."""
    readers = {blob: layer for layer in layers for blob in layer.bottoms}
    found: list[NcnnLayer] = []
    moved: set[str] = set()
    for layer in layers:
        if layer.name in moved:
            continue
        found.append(layer)
        alike: dict[tuple, list[NcnnLayer]] = defaultdict(list)
        for reader in (readers.get(top) for top in layer.tops if layer.type == 'Split'):
            if reader is not None and reader.name.startswith(_PREFIX):
                alike[tuple(reader.params.items())].append(reader)
        for first, *others in alike.values():
            if not others:
                continue
            moved |= {first.name, *(other.name for other in others)}
            spare = {other.bottoms[0] for other in others}
            layer.tops = [top for top in layer.tops if top not in spare]
            blobs = first.bottoms
            if len(layer.tops) == 1:
                blobs = found.pop().bottoms
            split = f'{first.name}_split'
            tops = [reader.tops[0] for reader in (first, *others)]
            found += [replace(first, bottoms=blobs, tops=[split]), NcnnLayer('Split', split, [split], tops)]
    return found


def merge_shifts(layers: list[NcnnLayer], mergeable: tuple[str, ...]) -> list[NcnnLayer]:
    """Lets int8 convolutions write shifted outputs where nobody reads the others: that costs nothing.

    Args:
        layers: The network; activation functions are fused.
        mergeable: Types of the layers that have a bias and a scale per output channel.
    """
    readers = {blob: layer for layer in layers for blob in layer.bottoms}
    gone = set()
    for layer in layers:
        after = readers.get(layer.tops[0]) if layer.tops else None
        if after is None or not after.name.startswith(_PREFIX) or layer.type not in mergeable:
            continue
        bounds = _bounds(layer)
        if layer.params.get(8, '0') == '0' or layer.params[5] == '0' or bounds is None:
            continue
        sign, offset = 1 if after.params[0] == _ADD else -1, float(after.params[2])
        if bounds != (-FLOAT_MAX, FLOAT_MAX):
            layer.params.update({9: '3', -23310: array(*sorted(sign * bound + offset for bound in bounds))})
        count, size = int(layer.params[0]), int(layer.params[6])
        start = 4 + size + -size % 4  # behind the weight
        numbers = np.frombuffer(layer.weights[start:], np.float32).copy()
        numbers[: 2 * count] *= sign  # bias, and scales
        numbers[:count] += offset
        layer.weights = layer.weights[:start] + floats(numbers)
        layer.tops = after.tops
        gone.add(after.name)
    return [layer for layer in layers if layer.name not in gone]


def _bounds(layer: NcnnLayer) -> tuple[float, float] | None:
    """Between what the fused activation function clips; None where it does something else."""
    kind = layer.params.get(9, '0')
    if kind == '3':
        low, high = map(float, layer.params[-23310].split(',')[1:])
        return low, high
    return {'0': (-FLOAT_MAX, FLOAT_MAX), '1': (0.0, FLOAT_MAX)}.get(kind)
