"""What a person sees of a run: a line per stage, one progress bar at a time, warnings.

Without a screen (from Python, or with ``--verbose``) all is as mmengine has it, and bars are for terminals alone.
"""

from __future__ import annotations

import io
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger, print_log
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# seconds between two lines of progress where there is no terminal, and between two pictures of a bar where there is
EVERY, REDRAWN = 10.0, 0.1


class Screen:
    """Where a command line writes; what others print goes to the log file.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage = ''
        self.bar: Progress | None = None
        self.shown, self.told = '', time.monotonic()
        self.replaced: list[tuple[MMLogger, list[logging.Handler]]] = []

    def show(self, what: str, done: int, total: int | None) -> None:
        """Shows how far something is, in place of what was shown before.

        Args:
            what: What is done.
            done: How many are.
            total: Of how many; None where nobody knows.
        """
        if not is_main_process():
            return
        now = time.monotonic()
        if self.stage and not what.startswith(self.stage):
            what = f'{self.stage}: {what}'
        if not self.console.is_terminal:
            if total is not None and now - self.told >= EVERY:
                self.told = now
                self.line(f'  {what}, {done} of {total}')
            return
        if self.bar is None:
            count = TextColumn('{task.fields[count]}')
            columns = TextColumn('  {task.description}'), BarColumn(), count, TimeRemainingColumn(compact=True)
            self.bar = Progress(
                *columns,
                console=self.console,
                transient=True,
                auto_refresh=False,  # by a thread of its own, while data loaders fork
                redirect_stdout=False,  # what others print is in the log file
                redirect_stderr=False,
            )
            self.bar.add_task(what, total=total, count='')
            self.bar.start()
            self.shown = what
        task = self.bar.task_ids[0]
        if what != self.shown:
            self.shown = what
            self.bar.reset(task, description=what, total=total)
        elif now - self.told < REDRAWN and done != total:
            return
        self.told = now
        count = '' if total is None else f'{done}/{total}'
        self.bar.update(task, completed=done, count=count, refresh=True)

    def clear(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def line(self, text: str, style: str | None = None) -> None:
        """Prints one line as it is, once for all processes."""
        if is_main_process():
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def adopt(self, logger: MMLogger) -> None:
        """Of a logger, shows warnings alone; its file keeps all."""
        self.replaced.append((logger, list(logger.handlers)))
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                logger.removeHandler(handler)
                logger.addHandler(_Warnings(self, max(handler.level, logging.WARNING)))

    def close(self) -> None:
        """Takes the bar away and gives loggers back what they had."""
        self.clear()
        for logger, handlers in self.replaced:
            own = [handler for handler in logger.handlers if not isinstance(handler, _Warnings)]
            logger.handlers[:] = handlers + [handler for handler in own if handler not in handlers]


class _Warnings(logging.Handler):
    def __init__(self, screen: Screen, level: int) -> None:
        super().__init__(level)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        if _by_mmengine():  # of its own parts, which a user cannot mend
            return
        try:
            self.screen.line(f'{record.levelname.lower()}: {record.getMessage()}', 'yellow')
        except Exception:  # as every handler of the standard library
            self.handleError(record)


def _by_mmengine() -> bool:
    """Whether mmengine itself is logging, and nobody through it."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get('__name__', '')
        if not name.startswith(('logging', 'mmengine.logging', __name__)):
            return name.startswith('mmengine.')
        frame = frame.f_back
    return False


class _ToLog(io.TextIOBase):
    """Standard output whose lines become lines of the log file."""

    def __init__(self) -> None:
        self.rest, self.busy = '', False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).replace('\r', '\n').split('\n')
        if not self.busy:
            self.busy = True  # a logger that writes to standard output would come back here
            try:
                for line in filter(str.strip, lines):
                    print_log(line, 'current')
            finally:
                self.busy = False
        return len(text)


_SCREEN: Screen | None = None


@contextmanager
def for_people(console: Console | None = None) -> Iterator[Screen]:
    """Shows a person what matters, and leaves all else to the log file.

    Args:
        console: Where to. Defaults to None: standard output.
    """
    global _SCREEN
    before, _SCREEN = _SCREEN, Screen(console or Console(file=sys.stdout))
    screen = _SCREEN

    def to_log(message, category, filename, lineno, file=None, line=None) -> None:
        print_log(f'{category.__name__}: {message} ({filename}:{lineno})', 'current')

    try:
        with redirect_stdout(_ToLog()), warnings.catch_warnings():
            warnings.showwarning = to_log
            screen.adopt(MMLogger.get_current_instance())
            yield screen
    finally:
        screen.close()
        _SCREEN = before


def adopted(logger: MMLogger) -> MMLogger:
    """A run's logger: where there is a screen, warnings alone are shown."""
    if _SCREEN is not None:
        _SCREEN.adopt(logger)
    return logger


def output() -> Console:
    """Where tables and results are printed."""
    return _SCREEN.console if _SCREEN is not None else Console()


@contextmanager
def stage(name: str, expected: float | None = None) -> Iterator[None]:
    """A stage of a run: one line when it is done.

    Args:
        name: Its name.
        expected: Seconds that it is thought to take. Defaults to None: nobody knows.
    """
    screen, start = _SCREEN, time.monotonic()
    if screen is None:
        yield
        return
    told = name.replace('_', ' ')
    screen.stage = told
    screen.show(told if expected is None else f'{told} (about {clock(expected)})', 0, None)
    try:
        yield
    finally:
        screen.clear()
        screen.stage = ''
    screen.line(f'{told:<28} {clock(time.monotonic() - start):>9}')


def taken_over(name: str) -> None:
    """Says that a stage is that of an earlier run."""
    if _SCREEN is not None:
        _SCREEN.line(f'{name.replace("_", " "):<28} {"as before":>9}')


def step(what: str, done: int, total: int | None) -> None:
    """Shows how far the present stage is; without a screen, nothing.

    Args:
        what: What is done.
        done: How many are.
        total: Of how many; None where nobody knows.
    """
    if _SCREEN is not None:
        _SCREEN.show(what, done, total)


def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yields items and shows how many are done.

    Args:
        items: What is worked through.
        description: What is done to them.
        total: Their number, where they do not tell it. Defaults to None.
    """
    if _SCREEN is None:
        console = Console()
        with Progress(console=console, disable=not console.is_terminal) as progress:
            yield from progress.track(items, total=total, description=description)
        return
    total = len(items) if total is None and hasattr(items, '__len__') else total
    step(description, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        step(description, done, total)
    if not _SCREEN.stage:
        _SCREEN.clear()


def clock(seconds: float) -> str:
    """A duration as a person says it."""
    if seconds < 90:
        return f'{seconds:.0f} s' if seconds >= 10 else f'{seconds:.1f} s'
    minutes = round(seconds / 60)
    return f'{minutes} min' if minutes < 90 else f'{minutes / 60:.1f} h'
