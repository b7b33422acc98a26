"""Which module calls are under way in a forward pass, and how often each called a function."""

from __future__ import annotations

from collections import Counter


class Frame:
    """One call of a module, with how often each function was called in it."""

    __slots__ = ('call', 'counts', 'module')

    def __init__(self, module: str, call: int) -> None:
        self.module, self.call = module, call
        self.counts = Counter()

    def next(self, function: str) -> tuple[str, int, str, int]:
        """Key of the function's next call."""
        index = self.counts[function]
        self.counts[function] = index + 1
        return self.module, self.call, function, index


class Frames:
    """The module calls that are under way; None stands for one whose operations are nobody's business."""

    def __init__(self) -> None:
        self.stack: list[Frame | None] = []
        self.calls = Counter()

    @property
    def top(self) -> Frame | None:
        return self.stack[-1] if self.stack else None

    def enter(self, module: str) -> None:
        self.stack.append(Frame(module, self.calls[module]))
        self.calls[module] += 1

    def leave(self, *_) -> None:
        if self.stack:
            self.stack.pop()

    def mute(self, *_) -> None:
        self.stack.append(None)
