"""A second wall behind :mod:`.stored_config`: while a stored config is built, nothing is imported, started or written.

The first wall reads the config and refuses what it does not know. This one does not read it: mmengine's look-ups find
registered names alone, and Python's own audit events tell of every process, connection and file.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.registry import registry as lookups

from mmdet_ptq.deploy.network.stored_config import SCOPES, WAY_OUT
from mmdet_ptq.errors import PTQError

_EVENTS = (
    *('os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn', 'os.startfile', 'os.system'),
    *('os.chmod', 'os.chown', 'os.kill', 'os.link', 'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir', 'os.symlink'),
    *('os.truncate', 'os.putenv', 'pty.spawn', 'shutil.', 'socket.', 'subprocess.Popen', 'urllib.Request'),
    *('http.client.', 'ftplib.', 'smtplib.', 'webbrowser.open'),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HERE = threading.local()
_INSTALLED = threading.Lock()


class Refused(PTQError, OSError):
    """What a stored config may not do. An ``OSError``, so that who can do without a file does without it."""

    __str__ = Exception.__str__


@contextmanager
def only_registered(path: str) -> Iterator[None]:
    """Runs a block of code that may build what is registered, and read the installed packages, and nothing else.

    Args:
        path: The file whose config is built, for messages.

    Raises:
        PTQError: Something else was asked for.
    """
    _install()
    before = lookups.get_object_from_string, lookups.import_module, sys.dont_write_bytecode

    def refuse(name: str) -> None:
        raise Refused(f'the config inside {path!r} asks for {name!r:.100}, which nobody has registered; {WAY_OUT}.')

    def import_registry(name: str, *rest: Any) -> Any:
        if name.partition('.')[0] not in SCOPES:
            refuse(name)
        return before[1](name, *rest)

    # mmengine imports a name that no registry holds
    lookups.get_object_from_string, lookups.import_module, sys.dont_write_bytecode = refuse, import_registry, True
    _HERE.path = path
    try:
        yield
    finally:
        _HERE.path = None
        lookups.get_object_from_string, lookups.import_module, sys.dont_write_bytecode = before


def _install() -> None:
    """An audit hook stays for good; outside of :func:`only_registered` it returns at once."""
    with _INSTALLED:
        if not getattr(_install, 'done', False):
            sys.addaudithook(_audit)
            _install.done = True


def _audit(event: str, arguments: tuple) -> None:
    path = getattr(_HERE, 'path', None)
    if path is None:
        return
    if event.startswith(_EVENTS) or (event == 'open' and not _is_installed(*arguments)):
        what = f' {arguments[0]!r:.100}' if arguments else ''
        raise Refused(f'the config inside {path!r} leads to {event}{what}; {WAY_OUT}.')


def _is_installed(name: Any, mode: str | None, flags: int | None) -> bool:
    """Whether a file is opened for reading, and belongs to the system or to a package."""
    if isinstance(name, int):
        return True
    if (mode and set(mode) & set('wax+')) or (flags or 0) & _WRITES:
        return False
    try:
        resolved = os.path.realpath(os.fsdecode(name))
    except (TypeError, ValueError):
        return False
    return resolved.startswith(_roots())


@functools.cache
def _roots() -> tuple[str, ...]:
    packages = [sys.modules[name].__file__ for name in ('mmdet', 'mmcv', 'mmengine', 'torch', 'mmdet_ptq')]
    folders = [*(str(Path(file).parent) for file in packages if file), *sysconfig.get_paths().values(), sys.base_prefix]
    return tuple(os.path.realpath(folder) + os.sep for folder in folders) + ('/proc/', '/sys/', '/dev/')
