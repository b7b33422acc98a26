"""One progress bar, on terminals alone: logs and pipes get no bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress


def bar() -> Progress:
    """A bar, to be entered as a context; silent where the output is no terminal."""
    console = Console()
    return Progress(console=console, disable=not console.is_terminal)


def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yields items and shows how many are done.

    Args:
        items: What is worked through.
        description: What is done to them.
        total: Their number, where they do not tell it. Defaults to None.
    """
    with bar() as progress:
        yield from progress.track(items, total=total, description=description)
