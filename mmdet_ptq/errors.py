"""The one exception type that a user's mistake raises: a single sentence that names the cause and the fix."""

from __future__ import annotations

import difflib
import errno
import inspect
import os
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class PTQError(Exception):
    """Bad input, told in one sentence: what is wrong, which key or file, and how to mend it.

    Args:
        sentence: The sentence. Names in it may come from anybody's file: what ends a line, or what a terminal obeys, is
            written out.
    """

    def __init__(self, sentence: str = '') -> None:
        super().__init__(''.join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the nearest of the known names, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ''


def check_choice(key: str, value: Any, known: Collection[str]) -> None:
    """Refuses what is none of the known words.

    Args:
        key: Where it stands, for the message.
        value: What stands there.
        known: What may.

    Raises:
        PTQError: With the nearest of them.
    """
    if value not in known:
        raise PTQError(
            f'`{key}` is {value!r}, which is unknown.{did_you_mean(value, known)} Known: {", ".join(known)}.'
        )


def one_line(error: Exception) -> str:
    """Another program's error as a part of a sentence: its type and its message, or else the code that raised it."""
    message = ' '.join(str(error).split())
    frames = [] if message else traceback.extract_tb(error.__traceback__)
    if frames:  # an assertion without a message, as mmdet has many
        message = f'{frames[-1].line} in {Path(frames[-1].filename).name}'
    return f'{type(error).__name__}: {message}'.rstrip('.')


def first_line(error: BaseException) -> str:
    """The first line of another program's error; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def building(config: Mapping, *keys: str) -> Iterator[None]:
    """Turns what fails while mmengine builds parts of a config into one sentence.

    Args:
        config: The config.
        keys: Its parts that are built. Defaults to all.

    Raises:
        PTQError: A type or argument is unknown, a package is missing, or a class refuses its arguments.
    """
    try:
        yield
    except PTQError:
        raise
    except Exception as error:  # the classes are anybody's
        parts = {key: config.get(key) for key in keys} if keys else config
        frames = [f.f_locals for f, _ in traceback.walk_tb(error.__traceback__) if f.f_code.co_name == 'build_from_cfg']
        # by default the whole: what mmengine builds on its own stands in no config
        whole = ' and '.join(f'`{key}`' for key in keys) or 'the config'
        raise PTQError(_told_of(error, frames[-1] if frames else {}, parts, whole)) from error


def _told_of(error: Exception, frame: Mapping[str, Any], config: Mapping, whole: str) -> str:
    """What mmengine's registry was building when it failed."""
    kind, cls = frame.get('obj_type'), frame.get('obj_cls')
    place = _place(config, frame.get('cfg'))
    where = f'`{place}` ({getattr(kind, "__name__", kind)})' if place else whole
    if kind is None and 'type' not in (frame.get('cfg') or {'type': None}):
        keys = ', '.join(map(repr, frame['cfg']))
        return f'a part of {whole}, the one with the keys {keys:.200}, has no `type`; add it.'
    if isinstance(kind, str) and cls is None:
        package, dot, _ = kind.partition('.')
        if dot and find_spec(package) is None:
            return f'{where} needs the package {package}, which is not installed; install it, or use another type.'
        hint = did_you_mean(kind, _registered(frame['registry'])) or ' If it is your own, import it: `custom_imports`.'
        return f'{f"`{place}.type`" if place else f"a type in {whole}"} is {kind!r}, which is unknown.{hint}'
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and unexpected:
        return f'{where} takes no argument {unexpected[1]!r}.{did_you_mean(unexpected[1], _arguments(cls))}'
    if isinstance(error, ImportError):
        return f'{where} needs a package that is missing: {" ".join(str(error).split()).rstrip(".")}.'
    return f'{where} cannot be built: {one_line(error)}.'


def _place(value: Any, part: Any, path: str = '') -> str:
    """Where a part stands in a config: the place that is equal, or else the first of its type."""
    if not isinstance(part, Mapping):
        return ''
    found = list(_places(value, part.get('type'), path))
    equal = [place for place, other in found if dict(other) == dict(part)]
    return next(iter(equal or [place for place, _ in found]), '')


def _places(value: Any, kind: Any, path: str) -> Iterator[tuple[str, Mapping]]:
    if isinstance(value, Mapping):
        if kind is not None and value.get('type') == kind:
            yield path, value
        for key, item in value.items():
            yield from _places(item, kind, f'{path}.{key}' if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _places(item, kind, f'{path}[{index}]')


def _registered(registry: Any) -> set[str]:
    """Names in a registry, its parents and their children."""
    while registry.parent is not None:
        registry = registry.parent
    return {*registry.module_dict}.union(*(child.module_dict for child in registry.children.values()))


def _arguments(cls: Any) -> set[str]:
    """Names of a class's arguments, its base classes' included."""
    if cls is None:  # a function of mmengine's own
        return set()
    makers = [base.__init__ for base in cls.__mro__] if inspect.isclass(cls) else [cls]
    return {name for maker in makers for name in inspect.signature(maker).parameters} - {'self', 'args', 'kwargs'}


def cannot_write(what: str, error: OSError) -> str:
    """The sentence for what could not be written."""
    why = 'the disk is full' if error.errno == errno.ENOSPC else (error.strerror or str(error))
    return (
        f'cannot write {what}: {why}; free some space, or choose another folder: --work-dir, then --resume; for '
        'tools/export.py --out.'
    )


def disk_error(error: BaseException) -> OSError | None:
    """That the disk is full, or a limit on files reached, if that is what led to an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


def no_checkpoint(path: str | os.PathLike) -> PTQError:
    """What to raise where a checkpoint is not; runs keep theirs in a folder that is named after the preset."""
    path = Path(path)
    try:
        near = sorted(path.parent.glob(f'*/{escape(path.name)}'))
    except (OSError, ValueError):  # folders that cannot be read, names that no file can have
        near = []
    hint = f' Did you mean {str(near[0])!r}?' if near else ''
    return PTQError(f'there is no checkpoint {str(path)!r}; check the path.{hint}')


def lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the run has ended, or does not answer."""
    text = f'{type(error).__name__} {error}'
    return isinstance(error, RuntimeError) and any(word in text for word in ('DistBackend', 'DistNetwork', 'gloo/'))
