"""Whether an integer checkpoint is whole and fits together, before anything is built from it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mmdet_ptq.deploy.checkpoint.packing import unflatten_tensors
from mmdet_ptq.deploy.checkpoint.text import GROUPS, PLAIN, TEXT
from mmdet_ptq.fields import Each, Fields, Malformed, Whole, check_form, check_plain
from mmdet_ptq.files import check_tensor
from mmdet_ptq.wrapping import Structure

CHECKSUM = 'checksum'
# absent in files of earlier versions
_LATER = {CHECKSUM: str, 'input_shape': [Whole(1, 2**16)], 'padded': bool}
_DTYPES = {
    name: getattr(torch, name) for name in 'bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64'.split()
}
# integers are stored in the smallest dtype that holds them
_NARROWED = {'int16', 'int32', 'int64'}
# numbers that take no space in a file: tensors of one number all over
MOST_EVEN = 2**26
# the largest image, with all its channels
_LARGEST = 2**28
_LAYER = Fields(dict(bits=Whole(1, 16), lowest=Whole(-(2**15), 2**15), rows=[Whole(1)], shape=[Whole(1)]))
_INDEX = Fields(dict(index=list, data=dict))
# a scale of ours; a detector's own modules have parameters of that name, too
_SCALE = re.compile(r'(\.quantizer|^ptq\.activations\.[^.]+)\.scale$')
_LIMIT = re.compile(r'\.scale_limit$')


def checksum(packed: Mapping) -> str:
    """Of the text and of all codes, scales and other tensors, as the file holds them."""
    digest = hashlib.sha256()
    for name, tensor in (
        (TEXT, packed[TEXT]),
        *((f'{group}/{dtype}', packed[group][dtype]) for group in GROUPS for dtype in sorted(packed[group])),
    ):
        digest.update(f'{name} {len(tensor)} '.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return f'sha256:{digest.hexdigest()}'


def check_packed(packed: Mapping) -> None:
    """Refuses a file whose fields or tensors are of another form, or that does not have its checksum.

    Raises:
        Malformed: What is wrong.
    """
    groups = dict.fromkeys(GROUPS, Each(_stored))
    plain = dict.fromkeys(PLAIN, (str, int))
    check_form(packed, Fields({**plain, **groups, TEXT: _stored}, {CHECKSUM: str}), 'the file')
    if packed[TEXT].dtype != torch.uint8:
        raise Malformed(f'its text is {packed[TEXT].dtype}')
    if CHECKSUM in packed and packed[CHECKSUM] != checksum(packed):
        raise Malformed('its numbers do not have the checksum that they were written with')


def check_state(state: Mapping) -> None:
    """Refuses a checkpoint whose parts do not fit together.

    Raises:
        Malformed: What is wrong.
        PTQError: The structure names a format that is unknown.
    """
    plain = {**dict.fromkeys(PLAIN, (str, int)), 'config': dict, 'dataset_meta': dict, 'structure': dict}
    known = Fields({**plain, 'layers': Each(_LAYER), **dict.fromkeys(GROUPS, _INDEX)}, _LATER)
    check_form(state, known, 'the file')
    for name in ('config', 'dataset_meta', 'structure'):
        check_plain(state[name], name)
    shape = state.get('input_shape', ())
    if len(shape) not in (0, 4) or math.prod(shape) > _LARGEST:
        raise Malformed(f'input_shape is {list(shape)[:8]}, which is no size of an image')
    for group in GROUPS:
        _check_index(state[group], group)
    structure = Structure.from_dict(state['structure'])
    structure.check()
    _check_layers(state, structure)
    for name, tensor in unflatten_tensors(state['tensors']).items():
        _check_numbers(name, tensor)


def declared_numbers(state: Mapping) -> int:
    """How many numbers a checkpoint's detector has."""
    shapes = [entry[2] for entry in state['tensors']['index']] + [entry['shape'] for entry in state['layers'].values()]
    return sum(map(math.prod, shapes))


def _stored(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f'must be a tensor, got a {type(tensor).__name__}'
    return check_tensor(tensor) or ('' if tensor.dim() == 1 else f'has the shape {tuple(tensor.shape)}')


def _check_index(flat: Mapping, group: str) -> None:
    """Every entry of an index must lie within the data, and none in another's."""
    check_form(flat['data'], Each(_stored), group)
    for name, tensor in flat['data'].items():
        if _DTYPES.get(name) != tensor.dtype:
            raise Malformed(f'{group}.{name} holds {tensor.dtype}')
    left, even, seen = {name: len(data) for name, data in flat['data'].items()}, MOST_EVEN, set()
    for place, entry in enumerate(flat['index']):
        where = f'{group}[{place}]'
        check_form(entry, list, where)
        if len(entry) not in (4, 5):
            raise Malformed(f'{where} has {len(entry)} fields')
        name, dtype, shape, offset, *stored = entry
        stored = stored[0] if stored else dtype
        check_form(dict(name=name, dtype=dtype, stored=stored), Each(str), where)
        check_form(shape, [Whole()], f'{where}.shape')
        check_form(offset, Whole(-(2**62), 2**62), f'{where}.offset')
        if dtype not in _DTYPES or not (stored == dtype or (dtype in _NARROWED and stored in _DTYPES)):
            raise Malformed(f'{name} has the type {dtype[:40]!r}, stored as {stored[:40]!r}')
        if name in seen:
            raise Malformed(f'{name} is there twice')
        seen.add(name)
        count = math.prod(shape)
        if offset < 0:
            even -= count
            fits = even >= 0 and (offset == -1 or -2 - offset < len(flat['data'].get(stored, ())))
        else:
            left[stored] = left.get(stored, 0) - count
            fits = left[stored] >= 0 and offset + count <= len(flat['data'][stored])
        if not fits:
            raise Malformed(f'{name} of shape {shape[:8]} is not within the numbers of the file')


def _check_layers(state: Mapping, structure: Structure) -> None:
    packed = {name: math.prod(shape) for name, _, shape, *_ in state['codes']['index']}
    specs = {layer.name: layer.weight for layer in structure.layers if layer.weight is not None}
    layers = state['layers']
    for found, what in ((layers, 'layers'), (packed, 'codes')):
        if found.keys() != specs.keys():
            odd = sorted(found.keys() ^ specs.keys())[0]
            raise Malformed(f'the structure and the {what} do not name the same layers, first {odd[:100]}')
    for name, entry in layers.items():
        rows, shape = entry['rows'], entry['shape']
        if len(rows) != 2 or math.prod(rows) != math.prod(shape):
            raise Malformed(f'the codes of {name} have {rows[:8]} rows and columns, its weight the shape {shape[:8]}')
        if packed[name] != -(-math.prod(rows) * entry['bits'] // 8):
            wanted = f'those of {math.prod(rows)} codes of {entry["bits"]} bits'
            raise Malformed(f'{name} has {packed[name]} bytes of codes, not {wanted}')
        channels = specs[name].get('num_channels')
        if channels not in (None, rows[0]):
            raise Malformed(f'{name} has {rows[0]} output channels, its format {channels!r:.40}')
        _check_neighbours(name, specs[name].get('neighbours'), rows[1])


def _check_neighbours(name: str, neighbours: object, columns: int) -> None:
    """Those of a channel's weights are as many as the channel has."""
    if neighbours is None:
        return
    form = Fields(dict(channels=Whole(1, 2**31)), dict(kernel=[Whole(1, 2**31)], slices=Whole(1, 2**31)))
    check_form(neighbours, form, f'the neighbours of {name}')
    if neighbours['channels'] * math.prod(neighbours.get('kernel', ())) != columns:
        raise Malformed(f'{name} has {columns} weights a channel, not as many as its neighbours tell')


def _check_numbers(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    if _LIMIT.search(name):
        # infinite where nothing bounds it
        if not (tensor > 0).all():
            raise Malformed(f'{name} is not positive')
    elif not torch.isfinite(tensor).all():
        raise Malformed(f'{name} holds NaN or infinity')
    elif _SCALE.search(name) and not (tensor > 0).all():
        raise Malformed(f'{name} holds a scale that is not positive')
    elif name.endswith('running_var') and (tensor < 0).any():
        raise Malformed(f'{name} holds a variance below zero')
