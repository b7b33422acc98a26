"""A work directory belongs to one run at a time, and what killed runs left half-written in it is removed."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import IO

from mmengine.logging import print_log

from mmdet_ptq.calibration.reconstruction.activation_store import FOLDER
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import TEMPORARY

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = '.lock'
# open as long as this process holds them: the kernel lets go of a lock when its process ends, however it ends
_held: dict[Path, IO[str]] = {}


def take_work_dir(work_dir: str | os.PathLike) -> None:
    """Takes a work directory for this process, until :func:`leave_work_dir` or its end, and tidies it up.

    Args:
        work_dir: The work directory; it is there.

    Raises:
        PTQError: Another process has it.
    """
    path = Path(work_dir).resolve() / LOCK
    if path in _held and os.fstat(_held[path].fileno()).st_nlink:
        return
    file = path.open('a+')
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, 'this system has no such locks')
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f'{os.getpid()}\n')
        file.flush()
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or 'unknown'
        file.close()
        raise PTQError(
            f'the folder {work_dir} is in use by another run (process {holder}); wait for it or end it, or choose '
            'another --work-dir.'
        ) from error
    except OSError as error:  # a file system of a network may have no locks, a full one no place
        print_log(
            f'the folder {work_dir} cannot be locked ({error.strerror}): see that no second run uses it',
            'current',
            level=logging.WARNING,
        )
    _held[path] = file
    _remove_leftovers(path.parent)


def leave_work_dir(work_dir: str | os.PathLike) -> None:
    """Lets other processes take a work directory."""
    file = _held.pop(Path(work_dir).resolve() / LOCK, None)
    if file is not None:
        file.close()


def _remove_leftovers(work_dir: Path) -> None:
    """Removes what runs that were killed had begun to write."""
    for path in [*work_dir.rglob(f'.*{TEMPORARY}'), *work_dir.rglob(f'{FOLDER}*')]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
