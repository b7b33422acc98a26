"""A hand-made detector whose every multiply-accumulate is known, and the quantized tiny detectors."""
from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from mmdet_ptq.testing import tiny_quantized


class ToyHead(nn.Module):
    """One convolution over two levels, and an output convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 5, 1)

    def forward(self, levels):
        return [self.out(self.conv(level).relu()) for level in levels]


class ToyDetector(nn.Module):
    """stem (3x3) - depthwise - pointwise - head on two levels; a linear layer on the pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.data_preprocessor = self.preprocess
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(4, 8, 1)
        self.linear = nn.Linear(8, 6)
        self.bbox_head = ToyHead()

    @staticmethod
    def preprocess(batch, training):
        return batch

    def features(self, x):
        return self.pointwise(self.depthwise(self.stem(x).relu()).relu())

    def forward(self, inputs, data_samples=None, mode='predict'):
        x = self.features(inputs)
        return self.bbox_head([x, x[..., ::2, ::2]]), self.linear(x.mean((2, 3)))


@pytest.fixture
def toy():
    return ToyDetector().eval()


@pytest.fixture
def image():
    return torch.randn(1, 3, 16, 16)


@pytest.fixture(scope='session')
def quantized():
    """Builds each quantized tiny detector once; a test that changes one works on a copy."""
    return functools.cache(tiny_quantized)
