"""What an integer checkpoint holds besides tensors, compressed: in small detectors names outweigh a tenth of the codes.

It is JSON, so that reading it runs no code; tuples are marked, as mmdet's configs tell them from lists.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import torch

from mmdet_ptq.fields import Fields, Malformed, check_form, check_plain
from mmdet_ptq.limits import MIB

TEXT = 'text'
# what a reader of any schema must see
PLAIN = ('format', 'schema', 'version')
# groups of tensors: their data stays as it is, their index is text
GROUPS = ('codes', 'tables', 'tensors')
# the largest detectors take a tenth of it
MOST_TEXT = 16 * MIB
_TUPLE = '__tuple__'


def pack_state(state: dict) -> dict:
    """Compresses everything but the tensors.

    Args:
        state: See :func:`mmdet_ptq.deploy.quantized_state`.

    Returns:
        ``dict(format, schema, version, text=uint8 tensor, codes, tables, tensors)``; the last three are dtype to flat
        tensor.
    """
    described = {key: value for key, value in state.items() if key not in (*PLAIN, *GROUPS)}
    described['index'] = {group: state[group]['index'] for group in GROUPS}
    packed = zlib.compress(json.dumps(_marked(described), separators=(',', ':')).encode(), 9)
    return dict(
        {key: state[key] for key in PLAIN},
        **{group: state[group]['data'] for group in GROUPS},
        **{TEXT: torch.from_numpy(np.frombuffer(packed, np.uint8).copy())},
    )


def unpack_state(packed: dict) -> dict:
    """Inverse of :func:`pack_state`.

    Raises:
        ValueError, zlib.error: It is damaged.
    """
    try:
        marked = json.loads(_decompressed(packed[TEXT].numpy().tobytes()))
    except RecursionError as error:
        raise Malformed('its text is nested too deep') from error
    check_plain(marked, 'its text')
    described = _unmarked(marked)
    check_form(described, dict, 'its text')
    index = described.pop('index', None)
    check_form(index, Fields(dict.fromkeys(GROUPS, list)), 'the index')
    twice = described.keys() & {*PLAIN, *GROUPS}
    if twice:
        raise Malformed(f'its text has the key {min(twice)!r}, which stands beside it')
    groups = {group: dict(index=index[group], data=packed[group]) for group in GROUPS}
    return dict({key: packed[key] for key in PLAIN}, **described, **groups)


def _decompressed(data: bytes) -> bytes:
    """The text; a small file may hold a bomb, so that it ends where no text of ours would be as long."""
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, MOST_TEXT)
    if not unpacker.eof:
        long = len(text) == MOST_TEXT
        raise Malformed(f'its text is longer than {MOST_TEXT // MIB} MiB' if long else 'its text breaks off')
    return text


def _marked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _marked(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_marked(inner) for inner in value]}
    return [_marked(inner) for inner in value] if isinstance(value, list) else value


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(inner) for inner in value]
    if isinstance(value, dict):
        return (
            tuple(map(_unmarked, value[_TUPLE]))
            if value.keys() == {_TUPLE} and isinstance(value[_TUPLE], list)
            else {key: _unmarked(inner) for key, inner in value.items()}
        )
    return value
