"""Ctrl-C while our command lines import what they need, which takes seconds."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# our command lines, by the names of their files
COMMANDS = {'ptq.py', 'analyze.py', 'export.py', 'test.py'}
COMMANDS |= {'mmdet-ptq', 'mmdet-ptq-analyze', 'mmdet-ptq-export', 'mmdet-ptq-test'}


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Lets Ctrl-C end a command line of ours with one sentence while a block of code imports.

    An exception would not do: libraries catch it, import again what was half imported, and fail in other ways.
    Programs of others keep what they do with Ctrl-C.
    """
    before = signal.getsignal(signal.SIGINT)
    ours = Path(sys.argv[0]).name in COMMANDS and before is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
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
