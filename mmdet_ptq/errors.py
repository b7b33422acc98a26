"""The one exception type that a user's mistake raises: a single sentence that names the cause and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PTQError(Exception):
    """Bad input, told in one sentence: what is wrong, which key or file, and how to mend it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the nearest of the known names, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ''


def one_line(error: Exception) -> str:
    """Another program's error as a part of a sentence: its type and its message in one line."""
    return f'{type(error).__name__}: {" ".join(str(error).split())}'.rstrip('.')
