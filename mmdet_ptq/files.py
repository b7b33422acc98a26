"""Reading and writing files so that a run is never left with half of one."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mmdet_ptq.errors import PTQError, cannot_write, disk_error, no_checkpoint
from mmdet_ptq.limits import MIB, bounded

# how the names of files end that are being written
TEMPORARY = '.tmp'
# what reading a checkpoint may take besides twice its size, and how fast it is at least
READING, READING_SECONDS, READING_SPEED = 512 * MIB, 5, 20 * MIB


def write_atomic(path: str | os.PathLike, write: Callable[[IO[bytes]], None]) -> None:
    """Writes a file under a temporary name and renames it, so that it is complete or absent.

    Args:
        path: Where the file goes; its folder is made.
        write: Writes the content into an open binary file.

    Raises:
        PTQError: The disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(TEMPORARY, f'.{path.name}.', path.parent)
        try:
            with os.fdopen(handle, 'wb') as file:
                write(file)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        # torch's writer fails once more while it closes
        cause = error if isinstance(error, OSError) else disk_error(error)
        if cause is None:
            raise
        raise PTQError(cannot_write(str(path), cause)) from error


def remove(path: str | os.PathLike) -> None:
    """Removes a file, if it is there.

    Raises:
        PTQError: It cannot be removed.
    """
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise PTQError(f'cannot replace {path}: {error.strerror or error}; choose another folder.') from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + '\n'
    write_atomic(path, lambda file: file.write(text.encode()))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def save_tensors(path: str | os.PathLike, value: Any) -> None:
    """Writes tensors in plain containers atomically; they load without pickled code."""
    write_atomic(path, lambda file: torch.save(value, file))


def load_tensors(path: str | os.PathLike) -> Any:
    """Loads a checkpoint without running any code it may carry.

    Raises:
        PTQError: The file is missing, damaged, or holds pickled objects.
    """
    if not Path(path).is_file():
        raise no_checkpoint(path)
    _check_archive(path)
    size = Path(path).stat().st_size
    try:
        with bounded(f'reading {str(path)!r}', 2 * size + READING, READING_SECONDS + size / READING_SPEED):
            return torch.load(path, map_location='cpu', weights_only=True)
    except PTQError:
        raise
    except pickle.UnpicklingError as error:
        if 'GLOBAL' in str(error):  # an object of a class outside torch's own
            raise PTQError(
                f'the checkpoint {str(path)!r} holds pickled objects, which could run code; if you trust it, convert '
                "it once: torch.save({'state_dict': torch.load(OLD, weights_only=False)['state_dict']}, NEW)."
            ) from error
        raise PTQError(f'the checkpoint {str(path)!r} is damaged or no torch checkpoint.') from error
    except Exception as error:  # a damaged file makes the unpickler fail in any way
        raise PTQError(f'the checkpoint {str(path)!r} is damaged or no torch checkpoint.') from error


def _check_archive(path: str | os.PathLike) -> None:
    """Refuses an archive that unpacks to more than it is, or is damaged; torch stores tensors as they are.

    Raises:
        PTQError: An entry is compressed, entries share bytes, or one does not have its checksum.
    """
    if not zipfile.is_zipfile(path):
        return  # of torch before 1.6, or nothing at all
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError) as error:
        raise PTQError(f'the checkpoint {str(path)!r} is damaged or no torch checkpoint.') from error
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
        raise PTQError(
            f'the checkpoint {str(path)!r} unpacks to more than it is, which torch never writes; load it with torch '
            'and save it again if you trust it.'
        )
    with zipfile.ZipFile(path) as archive:
        intact = [_intact(archive, entry) for entry in entries]
    # torch can leave the checksums out: then none is right
    if any(intact) and not all(intact):
        raise PTQError(f'the checkpoint {str(path)!r} is damaged: its numbers do not have their checksum.')


def _intact(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """Whether an entry of an archive has the checksum that it was written with."""
    try:
        with archive.open(entry) as content:
            while content.read(MIB):
                pass
        return True
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError):
        return False


def check_tensor(tensor: Tensor) -> str:
    """What is wrong with a tensor that a file gave, in words; '' if it is plain numbers, and the file holds them."""
    if tensor.layout is not torch.strided:
        return 'is sparse'
    if tensor.is_meta:
        return 'is on the meta device, without its numbers'
    if tensor.is_quantized or tensor.is_nested or type(tensor) not in (Tensor, torch.nn.Parameter):
        return f'is a {type(tensor).__name__} of another kind than plain numbers'
    # a few numbers may stand for many, as `expand` leaves them
    if tensor.numel() > MIB and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return 'claims more numbers than the file holds'
    return ''


def check_space(folder: str | os.PathLike, needed: int, option: str = '--work-dir') -> None:
    """Refuses a folder that cannot hold what a run writes, before the run begins.

    Args:
        folder: The folder; it is made.
        needed: Bytes the run writes at least.
        option: What names it, for messages. Defaults to '--work-dir'.

    Raises:
        PTQError: Too little space, or the folder cannot be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:  # a name may hold what no name can
        why = getattr(error, 'strerror', None) or str(error)
        raise PTQError(f'cannot make the folder {str(folder)!r:.200}: {why}; choose another {option}.') from error
    if not os.access(folder, os.W_OK):
        raise PTQError(f'the folder {folder} cannot be written; choose another {option}.')
    if free < needed:
        raise PTQError(
            f'the folder {folder} has {free >> 20} MiB free and this run writes about {needed >> 20} MiB; '
            f'free some space or choose another {option}.'
        )


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
