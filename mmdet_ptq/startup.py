"""How our command lines begin: who is one, and Ctrl-C while they import what they need, which takes seconds."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path

# programs that end in mmdet_ptq.cli, installed and in a clone
_COMMANDS = ('mmdet-ptq', 'mmdet-ptq-analyze', 'mmdet-ptq-export', 'mmdet-ptq-test')
_TOOLS = ('analyze', 'export', 'ptq', 'test')


def is_command() -> bool:
    """Whether a command line of ours imports the package, which mends when it begins to work."""
    path, tools = Path(sys.argv[0] if sys.argv else '').absolute(), Path(__file__).absolute().parents[1] / 'tools'
    ours = path.stem in _COMMANDS or (path.parent == tools and path.stem in _TOOLS)
    # a process that a command spawns, as data loaders do, has its name and never comes by the command line
    return ours and parent_process() is None


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Lets Ctrl-C end a command line with one sentence while a block of code imports.

    An exception would not do: libraries catch it, import again what was half imported, and fail in other ways.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(*_: object) -> None:
    os.write(2, b'\ninterrupted; nothing was begun, run the same command again.\n')
    os._exit(130)
