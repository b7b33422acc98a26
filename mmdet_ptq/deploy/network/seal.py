"""The checksum of an exported model, over every byte of its files: a model whose numbers changed is noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mmdet_ptq.errors import PTQError

CHECKSUM = 'checksum'
# stands where the checksum will: a checksum cannot count itself
BLANK = f'sha256:{"0" * 64}'


def seal(main: bytes, *others: bytes) -> bytes:
    """The main file of a model with the checksum of all its files in the place of :data:`BLANK`.

    Args:
        main: The file that carries the meta.
        *others: The files beside it.
    """
    if main.count(BLANK.encode()) != 1:
        raise ValueError('the meta of a model has one place for its checksum')
    return main.replace(BLANK.encode(), _digest(main, *others).encode())


def check_seal(told: str | None, path: Path, *others: Path) -> None:
    """Refuses a model whose files are not those that were sealed; older versions wrote no checksum.

    Args:
        told: The checksum, or None where there is none.
        path: The file that carries it.
        *others: The files beside it.

    Raises:
        PTQError: A byte has changed, or a file is of another export.
    """
    if told is None:
        return
    main = path.read_bytes()
    if (
        len(told) != len(BLANK)
        or _digest(main.replace(told.encode(), BLANK.encode()), *(other.read_bytes() for other in others)) != told
    ):
        names = ' and '.join(repr(str(file)) for file in (path, *others))
        raise PTQError(
            f'{names} changed since the export, or do not belong together: the checksum is another; export again.'
        )


def _digest(*files: bytes) -> str:
    digest = hashlib.sha256()
    for content in files:
        digest.update(f'{len(content)} '.encode())
        digest.update(content)
    return f'sha256:{digest.hexdigest()}'
