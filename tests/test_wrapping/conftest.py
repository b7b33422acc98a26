"""A hand-made detector whose every multiply-accumulate is known, and the quantized tiny detectors."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.testing import tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE, predict
from mmdet_ptq.wrapping import prepare_detector


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


@pytest.fixture(autouse=True)
def no_mode_is_left():
    yield
    assert torch._C._len_torch_function_stack() == 0


@pytest.fixture(scope='session')
def flowing(quantized):
    """Builds each tiny detector with each dataflow once."""
    built = {}

    def get(kind, dataflow='full'):
        if (kind, dataflow) not in built:
            detector = tiny_detector(kind)
            structure = prepare_detector(
                detector,
                PTQConfig.from_dict({**OBSERVE, 'dataflow': dataflow}),
                lambda: predict(detector, tiny_batch(1)),
            )
            observe_activations(detector, [tiny_batch(2, seed=1)], structure)
            built[kind, dataflow] = detector, structure
        return built[kind, dataflow]

    return get
