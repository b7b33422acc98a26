"""Bounds on what opening a file may cost: the operating system keeps the memory, a watchdog the processor time."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from mmdet_ptq.errors import PTQError

MIB = 1 << 20
# address space that a thread reserves: its stack, and an arena of the allocator
_PER_THREAD = 72 * MIB
_POLL = 0.1
# the limit is the process's: one at a time
_ONE = threading.RLock()


class _OutOfTime(BaseException):
    """Not an ``Exception``: nobody on the way takes it for an error of his own."""


@contextmanager
def bounded(what: str, memory: int, seconds: float | None = None) -> Iterator[None]:
    """Runs a block of code that may take so much and no more.

    Memory is bounded on Linux, processor time everywhere.

    Args:
        what: What is done, for the message.
        memory: Bytes, beyond what the process has already.
        seconds: Processor time of this thread. Defaults to None: as much as it likes.

    Raises:
        PTQError: It took more.
    """
    try:
        # the watchdog is gone before the limit is taken back: it must not interrupt that
        with _ONE, _address_space(memory), nullcontext() if seconds is None else _within(seconds):
            yield
    except _OutOfTime:
        raise PTQError(f'{what} takes more than {seconds:.0f} s; the file is damaged or was made to do so.') from None
    except PTQError:
        raise
    except Exception as error:  # runtimes raise classes of their own
        if not _is_memory(error):
            raise
        raise PTQError(
            f'{what} takes more than {memory // MIB} MiB of memory; the file is damaged or was made to do so.'
        ) from error


def _is_memory(error: BaseException) -> bool:
    told = str(error)
    return isinstance(error, MemoryError) or 'allocate memory' in told or 'bad_alloc' in told


@contextmanager
def _address_space(memory: int) -> Iterator[None]:
    try:
        import resource

        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = used + memory + _PER_THREAD * (os.cpu_count() or 1)
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    thread, over, sent = threading.get_ident(), threading.Event(), []
    clock = _clock(thread)
    end = clock() + seconds
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def watch() -> None:
        while not over.wait(_POLL):
            if clock() > end:
                sent.append(True)
                raise_in(ctypes.c_ulong(thread), ctypes.py_object(_OutOfTime))

    watcher = threading.Thread(target=watch, name='mmdet_ptq.limits', daemon=True)
    watcher.start()
    try:
        yield
    finally:
        while watcher.is_alive():
            try:
                over.set()
                watcher.join()
            except _OutOfTime:  # one more, sent meanwhile
                pass
        if sent:  # and perhaps has not arrived; asked for in vain, it slows down the interpreter for good
            raise_in(ctypes.c_ulong(thread), None)


def _clock(thread: int) -> Callable[[], float]:
    """Processor time of a thread, or the time on the wall where a system does not tell it."""
    if not hasattr(time, 'pthread_getcpuclockid'):
        return time.monotonic
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)
