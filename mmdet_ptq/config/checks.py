"""Checks of config values: one sentence that names the key and the fix."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mmdet_ptq.errors import PTQError, did_you_mean


def build(cls, key: str, values: Any):
    if not isinstance(values, dict):
        raise PTQError(f'`{key}` must be a dict, got {values!r}.')
    known = {f.name: f for f in fields(cls)}
    known_keys(key, values, known)
    for name, value in values.items():
        check_type(f'{key}.{name}', value, known[name].type)
    built = cls(**values)
    built.check(key)
    return built


_TYPES = {
    'int': int,
    'float': (int, float),
    'str': str,
    'bool': bool,
    'dict': dict,
    'list': (list, tuple),
    'None': type(None),
}


def check_type(key: str, value: Any, annotation: str) -> None:
    names = [part.strip() for part in annotation.split('|')]
    allowed = tuple(t for n in names for t in (_TYPES[n] if isinstance(_TYPES[n], tuple) else (_TYPES[n],)))
    if isinstance(value, bool) and bool not in allowed or not isinstance(value, allowed):
        raise PTQError(f'`{key}` must be {annotation}, got {value!r}.')
    if isinstance(value, float) and not math.isfinite(value):
        raise PTQError(f'`{key}` must be a finite number, got {value!r}.')


def known_keys(key: str, values: Mapping, known) -> None:
    for name in values:
        if name not in known:
            raise PTQError(f'`{key}` has no key {name!r}.{did_you_mean(name, known)} Known: {", ".join(known)}.')


def choice(key: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise PTQError(
            f'`{key}` is {value!r}, which is unknown.{did_you_mean(value, choices)} Known: {", ".join(choices)}.'
        )


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


def plain(value: Any) -> Any:
    """Mmengine's ConfigDict and friends as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, type):
        return f'{value.__module__}.{value.__qualname__}'
    return value
