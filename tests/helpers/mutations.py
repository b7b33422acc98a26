"""Random damage with a fixed seed: of plain containers, and of bytes."""

from __future__ import annotations

import copy
import random
import string
from collections.abc import Iterator
from typing import Any

import torch

JUNK = (None, True, '', 'nothing', 0, -1, 3, 1.5, float('nan'), float('inf'), [], {}, [1, 'a'], {'a': 1}, '8', b'x', ())


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every entry of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutated(value: Any, draw: random.Random, special: tuple = ()) -> tuple[Any, str]:
    """A copy with one entry changed, removed, renamed, doubled or added, and what was done.

    Args:
        value: Nested dicts and lists.
        draw: Random numbers.
        special: Further values that an entry may be replaced by.
    """
    value = copy.deepcopy(value)
    *parents, key = draw.choice(list(places(value)))
    place = value
    for parent in parents:
        place = place[parent]
    path = '.'.join(map(str, (*parents, key)))
    act = draw.choice(('replace', 'replace', 'remove', 'rename', 'add', 'typo'))
    old = place[key]
    if act == 'typo' and isinstance(old, str) and old:
        at = draw.randrange(len(old))
        place[key] = old[:at] + draw.choice(string.ascii_letters) + old[at + 1 :]
    elif act == 'remove':
        del place[key]
    elif act == 'rename' and isinstance(place, dict):
        place[f'{key}x' if isinstance(key, str) else key + 1] = place.pop(key)
    elif act == 'add' and isinstance(place, dict):
        place['unheard_of'] = draw.choice(JUNK)
    elif isinstance(old, torch.Tensor):
        place[key] = draw.choice(
            (old.double(), old.flatten()[:-1], old * float('nan'), old.to(torch.int64), old[None], None)
        )
        act = 'tensor'
    else:
        act, place[key] = 'replace', copy.deepcopy(draw.choice((*JUNK, *special)))
    now = place.get(key, '-') if isinstance(place, dict) else '...'
    return value, f'{act} {path} ({old!r:.40} -> {now!r:.60})'


def damaged(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes with some flipped, cut off, or zeroed, and what was done."""
    act, at = draw.choice(('flip', 'flip', 'cut', 'zero', 'insert')), draw.randrange(len(content))
    if act == 'flip':
        out = content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    elif act == 'cut':
        out = content[:at]
    elif act == 'zero':
        out = content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]
    else:
        out = content[:at] + b'x' + content[at:]
    return out, f'{act} at {at} of {len(content)}'
