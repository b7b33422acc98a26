"""What an integer checkpoint holds besides tensors, compressed: in small detectors names outweigh a tenth of the codes.

It is JSON, so that reading it runs no code; tuples are marked, as mmdet's configs tell them from lists.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import torch

TEXT = 'text'
# what a reader of any schema must see
_PLAIN = ('format', 'schema', 'version')
# groups of tensors: their data stays as it is, their index is text
_GROUPS = ('codes', 'tables', 'tensors')
_TUPLE = '__tuple__'


def pack_state(state: dict) -> dict:
    """Compresses everything but the tensors.

    Args:
        state: See :func:`mmdet_ptq.deploy.quantized_state`.

    Returns:
        ``dict(format, schema, version, text=uint8 tensor, codes, tables, tensors)``; the last three are dtype to flat
        tensor.
    """
    described = {key: value for key, value in state.items() if key not in (*_PLAIN, *_GROUPS)}
    described['index'] = {group: state[group]['index'] for group in _GROUPS}
    packed = zlib.compress(json.dumps(_marked(described), separators=(',', ':')).encode(), 9)
    return dict(
        {key: state[key] for key in _PLAIN},
        **{group: state[group]['data'] for group in _GROUPS},
        **{TEXT: torch.from_numpy(np.frombuffer(packed, np.uint8).copy())},
    )


def unpack_state(packed: dict) -> dict:
    """Inverse of :func:`pack_state`.

    Raises:
        KeyError, ValueError, zlib.error: It is damaged.
    """
    described = _unmarked(json.loads(zlib.decompress(packed[TEXT].numpy().tobytes())))
    index = described.pop('index')
    groups = {group: dict(index=index[group], data=packed[group]) for group in _GROUPS}
    return dict({key: packed[key] for key in _PLAIN}, **described, **groups)


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
            if value.keys() == {_TUPLE}
            else {key: _unmarked(inner) for key, inner in value.items()}
        )
    return value
