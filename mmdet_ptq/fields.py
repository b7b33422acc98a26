"""Plain data: made of other containers, and whether what a file gave has the form it should have, in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

# what plain data may hold, and how deep
MOST_VALUES, MOST_NESTED = 10**6, 100
_TOLD = {str: 'text', int: 'a whole number', float: 'a number', bool: 'True or False', dict: 'a dict', list: 'a list'}


class Malformed(ValueError):
    """Data has another form, told in words."""


@dataclass(frozen=True)
class Fields:
    """The form of a dict with known keys.

    Attributes:
        required: Key to the form of its value.
        optional: The same of keys that may be absent.
    """

    required: Mapping[str, Any]
    optional: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Each:
    """The form of a dict with any text for keys.

    Attributes:
        form: Of its values.
    """

    form: Any


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds, both of them included."""

    low: int = 0
    high: int = 2**63 - 1


def check_form(value: Any, form: Any, where: str) -> None:
    """Refuses data of another form.

    Args:
        value: The data.
        form: A type; a tuple of forms of which one must fit; a list of one form, for a list or tuple of such; None;
            :class:`Fields`, :class:`Each`, :class:`Whole`, or a function that returns what is wrong, '' for nothing.
        where: What the data is, for messages.

    Raises:
        Malformed: What is wrong, and where.
    """
    if isinstance(form, tuple):
        _check_any(value, form, where)
    elif isinstance(form, list):
        _check_kind(value, isinstance(value, list | tuple), where, 'a list')
        for place, item in enumerate(value):
            check_form(item, form[0], f'{where}[{place}]')
    elif isinstance(form, Each | Fields):
        _check_kind(value, isinstance(value, Mapping), where, 'a dict')
        _check_keys(value, form, where)
    elif isinstance(form, Whole):
        fits = _is(value, int) and form.low <= value <= form.high
        _check_kind(value, fits, where, f'a whole number from {form.low} to {form.high}')
    elif form is None:
        _check_kind(value, value is None, where, 'None')
    elif isinstance(form, type):
        _check_kind(value, _is(value, form), where, _TOLD[form])
    else:
        wrong = form(value)
        if wrong:
            raise Malformed(f'{where} {wrong}')


def _check_keys(value: Mapping, form: Each | Fields, where: str) -> None:
    for key in value:
        _check_kind(key, isinstance(key, str), f'a key of {where}', 'text')
    if isinstance(form, Each):
        for key, inner in value.items():
            check_form(inner, form.form, f'{where}.{key[:100]}')
        return
    known = {**form.required, **form.optional}
    missing = [key for key in form.required if key not in value]
    unknown = [key for key in value if key not in known]
    if unknown:
        raise Malformed(f'{where} has the unknown field `{unknown[0][:100]}`')
    if missing:
        raise Malformed(f'{where} lacks the field `{missing[0]}`')
    for key, inner in value.items():
        check_form(inner, known[key], f'{where}.{key}')


def _check_any(value: Any, forms: tuple, where: str) -> None:
    wrong = None
    for form in forms:
        try:
            return check_form(value, form, where)
        except Malformed as error:
            # what is told is about the last form, unless that is None
            wrong = error if wrong is None or form is not None else wrong
    raise wrong


def _check_kind(value: Any, fits: bool, where: str, wanted: str) -> None:
    if not fits:
        told = repr(value)[:60] if isinstance(value, str | int | float | None) else f'a {type(value).__name__}'
        raise Malformed(f'{where} must be {wanted}, got {told}')


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def plain(value: Any, leaf: Callable[[Any], Any], tuples: type = list) -> Any:
    """Dicts, lists and tuples of whatever class as plain ones, with text for keys.

    Args:
        value: Nested containers.
        leaf: What becomes of what they hold.
        tuples: What becomes of tuples. Defaults to lists.
    """
    if isinstance(value, Mapping):
        return {sys.intern(str(key)): plain(inner, leaf, tuples) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuples)(plain(inner, leaf, tuples) for inner in value)
    return leaf(value)


def qualified(value: type | FunctionType) -> str:
    """A class or function by its name."""
    return f'{value.__module__}.{value.__qualname__}'


def check_plain(value: Any, where: str) -> None:
    """Refuses what is no plain data, or so much of it that to walk through it would take long.

    Data from a pickle may hold itself, or the same list twice in a list that stands twice in another.

    Raises:
        Malformed: It holds anything else, too many values, or is nested too deep.
    """
    left, stack = MOST_VALUES, [(value, 0)]
    while stack:
        inner, depth = stack.pop()
        left -= 1
        if left < (len(inner) if isinstance(inner, Mapping | list | tuple) else 0) or depth > MOST_NESTED:
            raise Malformed(f'{where} holds too much: more than {MOST_VALUES} values, or {MOST_NESTED} in each other')
        if isinstance(inner, Mapping):
            for key in inner:
                _check_kind(key, isinstance(key, str), f'a key of {where}', 'text')
            stack.extend((item, depth + 1) for item in inner.values())
        elif isinstance(inner, list | tuple):
            stack.extend((item, depth + 1) for item in inner)
        elif not isinstance(inner, str | int | float | None):
            raise Malformed(f'{where} holds a {type(inner).__name__}, which is no plain data')
