"""Names that take few bytes."""
from __future__ import annotations

import itertools
import string
from collections.abc import Iterator


def short_names() -> Iterator[str]:
    """a, b, ... Z, aa, ab, ..."""
    for length in itertools.count(1):
        yield from map(''.join, itertools.product(string.ascii_letters, repeat=length))
