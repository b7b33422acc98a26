"""Checks of config values: one sentence that names the key and the fix."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_type_hints

from mmdet_ptq.errors import PTQError, did_you_mean


def build(cls, key: str, values: Any):
    if not isinstance(values, dict):
        raise PTQError(f'`{key}` must be a dict, got {values!r}.')
    # without the names of the class: one of its keys is called float
    known = get_type_hints(cls, localns={})
    known_keys(key, values, known)
    for name, value in values.items():
        check_type(f'{key}.{name}', value, known[name])
    built = cls(**values)
    built.check(key)
    return built


_ALSO = {float: int, list: tuple}


def check_type(key: str, value: Any, kind: type | UnionType) -> None:
    allowed = get_args(kind) or (kind,)
    allowed += tuple(_ALSO[one] for one in allowed if one in _ALSO)
    if isinstance(value, bool) and bool not in allowed or not isinstance(value, allowed):
        told = kind.__name__ if isinstance(kind, type) else kind
        raise PTQError(f'`{key}` must be {told}, got {value!r}.')
    if isinstance(value, float) and not math.isfinite(value):
        raise PTQError(f'`{key}` must be a finite number, got {value!r}.')


def known_keys(key: str, values: Mapping, known) -> None:
    for name in values:
        if name not in known:
            raise PTQError(f'`{key}` has no key {name!r}.{did_you_mean(name, known)} Known: {", ".join(known)}.')


def positive(key: str, obj: Any, *names: str) -> None:
    for name in names:
        if getattr(obj, name) <= 0:
            raise PTQError(f'`{key}.{name}` must be positive, got {getattr(obj, name)!r}.')


def check_seed(key: str, seed: Any) -> None:
    """Refuses what NumPy's generators do not take."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise PTQError(f'`{key}` must be a whole number from 0 to 4294967295, got {seed!r}.')


def merge(base: dict, change: Mapping) -> dict:
    """Deep merge; a dict with a new ``type`` replaces the old one instead of inheriting its arguments."""
    out = dict(base)
    for key, value in change.items():
        old = out.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and key != 'overrides' and _same_type(value, old):
            out[key] = merge(dict(old), value)
        else:
            out[key] = copy.deepcopy(value)
    return out


def _same_type(value: Mapping, old: Mapping) -> bool:
    """Whether a dict names the type of the old one, with or without its scope, or none."""
    first, second = (str(kind).rpartition('.')[2] for kind in (value.get('type', old.get('type')), old.get('type')))
    return first == second
