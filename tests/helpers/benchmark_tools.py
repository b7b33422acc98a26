"""What tests of the benchmarks share."""

import csv
import importlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / 'benchmarks'
SHAPE = (1, 3, 64, 64)


class ForeignConv(nn.Conv2d):
    """As mmcv's Conv2dAdaptivePadding is one."""


def module(name):
    """A benchmark: scripts beside the package that import each other by their own names."""
    return importlib.import_module(name)


def assert_close(found, wanted):
    """Eight bits after a few images: close to float, and not float itself."""
    assert [a.shape for a in found] == [b.shape for b in wanted]
    a, b = (np.concatenate([array.ravel() for array in arrays]) for arrays in (found, wanted))
    assert 0 < np.abs(a - b).mean() < 0.2 * b.std()


@torch.no_grad()
def raw(detector, image):
    outputs = detector(torch.from_numpy(image), None, mode='tensor')
    return [tensor.numpy() for group in outputs for tensor in group]


def read(path):
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))
