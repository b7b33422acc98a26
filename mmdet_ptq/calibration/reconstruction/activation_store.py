"""Cached activations: in memory as long as they fit, on disk beyond."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mmdet_ptq.files import check_space

# how the folders of a run begin, for whoever removes those of a killed one
FOLDER = 'activations-'


class ActivationStore:
    """Keeps tensors by number.

    Args:
        limit_bytes: What may stay in memory.
        folder: Where the rest goes; a new folder inside it is made, and removed by :meth:`close`.
    """

    def __init__(self, limit_bytes: int, folder: str | Path) -> None:
        self.limit_bytes = limit_bytes
        self.parent = Path(folder)
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0
        self._folder: Path | None = None
        self._tensors: dict[int, Tensor] = {}
        self._numbers = itertools.count()

    def put(self, tensor: Tensor) -> int:
        """Keeps a copy of the tensor and returns its number."""
        number, size = next(self._numbers), tensor.numel() * tensor.element_size()
        copy = tensor.detach().to('cpu', copy=True).contiguous()
        if self.bytes_in_memory + size > self.limit_bytes:
            if self._folder is None:
                self.parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=self.parent))
            check_space(self._folder, size)
            torch.save(copy, self._path(number))
            self.bytes_on_disk += size
        else:
            self._tensors[number] = copy
            self.bytes_in_memory += size
        return number

    def get(self, number: int) -> Tensor:
        """The tensor of a number; do not write to it."""
        if number in self._tensors:
            return self._tensors[number]
        # mapped: a few rows of it are read without the rest
        return torch.load(self._path(number), mmap=True, weights_only=True)

    def drop(self, number: int) -> None:
        """Forgets a tensor."""
        tensor = self._tensors.pop(number, None)
        if tensor is not None:
            self.bytes_in_memory -= tensor.numel() * tensor.element_size()
        else:
            self._path(number).unlink()

    def close(self) -> None:
        """Forgets everything."""
        self._tensors.clear()
        self.bytes_in_memory = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _path(self, number: int) -> Path:
        return self._folder / f'{number}.pt'
