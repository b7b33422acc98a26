"""A network of ncnn's is accepted as a detector's only if its outputs are those."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping import prepare_detector
from mmdet_ptq.wrapping.state import STATE

pytest.importorskip('ncnn', reason="needs ncnn: pip install 'mmdet-ptq[ncnn]'")

from mmdet_ptq.deploy.ncnn import verify as module
from mmdet_ptq.deploy.ncnn.format import NcnnLayer, floats
from mmdet_ptq.deploy.ncnn.verify import verify

SHAPE = (1, 3, 6, 7)
MIN_MAX = dict(type='mmdet_ptq.MinMaxObserver')


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def data_preprocessor(self, data, training):
        return data

    def forward(self, inputs, data_samples=None, mode='predict'):
        return [self.conv(inputs)]


def quantized(**ptq):
    torch.manual_seed(0)
    made = OneLayer().eval()
    batch = torch.randn(2, *SHAPE[1:])
    cfg = PTQConfig.from_dict(dict(preset='w8a8_observe', **ptq))
    structure = prepare_detector(made, cfg, lambda: made(batch))
    observe_activations(made, [dict(inputs=batch)], structure)
    return made.requires_grad_(False)


@pytest.fixture(scope='module')
def detector():
    return quantized(activations=dict(bits=3, observer=MIN_MAX))


def convolution(weight, bias, shift=0.0, outputs='out0'):
    """A float network that computes a convolution."""
    sizes = {0: str(len(weight)), 1: '1', 5: '1', 6: str(weight.numel())}
    numbers = bytes(4) + floats(weight) + floats(bias + shift)
    return [
        NcnnLayer('Input', 'in0', [], ['in0']),
        NcnnLayer('Convolution', 'conv', ['in0'], [outputs], sizes, numbers),
    ]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(module, 'print_log', lambda text, *_: lines.append(text))
    return lines


@pytest.fixture
def example():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def test_the_same_weights_are_the_detector_with_inputs_that_are_not_rounded(detector, example, said):
    layers = convolution(detector.conv.weight, detector.conv.bias)
    before = detector(example)[0]
    verify(detector, example, layers, layers)
    # the integers are compared with the simulation, whose input has 3 bits
    exact = nn.functional.conv2d(example, detector.conv.weight, detector.conv.bias)
    wanted = (exact - before).square().mean().sqrt() / before.std(correction=0)
    assert said == [
        f'ncnn: on noise, outputs differ from the simulation by {float(wanted):.2g} of their standard deviation at most'
    ]
    assert float(wanted) > 0.05
    # and the detector simulates as before
    assert detector(example)[0].equal(before)


@pytest.mark.parametrize('share, refused', [(0.009, False), (0.011, True), (np.nan, True)])
def test_outputs_may_differ_by_a_hundredth_of_their_spread(detector, example, said, share, refused):
    weight, bias = detector.conv.weight, detector.conv.bias
    spread = nn.functional.conv2d(example, weight, bias).std(correction=0).item()
    wrong, right = convolution(weight, bias, share * spread), convolution(weight, bias)
    if not refused:
        verify(detector, example, wrong, right)
        return
    figure = 'nan' if np.isnan(share) else '0.011'
    with pytest.raises(PTQError, match=rf"in float, ncnn's outputs differ from the detector's by {figure} of") as told:
        verify(detector, example, wrong, right)
    assert '\n' not in str(told.value) and not said


def test_integers_alone_refuse_nothing(detector, example, said):
    weight, bias = detector.conv.weight, detector.conv.bias
    verify(detector, example, convolution(weight, bias), convolution(weight, bias, 100.0))
    assert len(said) == 1 and float(said[0].split(' by ')[1].split()[0]) > 10


def test_other_shapes_and_missing_outputs_are_refused(detector, example):
    weight, bias = detector.conv.weight, detector.conv.bias
    right = convolution(weight, bias)
    with pytest.raises(PTQError, match=r'shapes \[\(1, 2, 6, 7\)\] in ncnn and \[\(1, 4, 6, 7\)\] in the detector'):
        verify(detector, example, convolution(weight[:2], bias[:2]), right)
    with pytest.raises(PTQError, match=r'the outputs have the shapes \[\] in ncnn and .*; export to another runtime'):
        verify(detector, example, convolution(weight, bias, outputs='other'), right)


def test_it_is_the_quantized_weight_that_counts(example, said):
    made = quantized(weights=dict(bits=2), activations=dict(observer=MIN_MAX))
    state, before = getattr(made, STATE), made(example)[0]
    original = made.conv.parametrizations.weight.original
    with pytest.raises(PTQError, match='an operator means something else there'):
        verify(made, example, *[convolution(original, made.conv.bias)] * 2)
    # what is refused leaves nothing changed
    assert state.only is None and state.mode == 'quantize' and made(example)[0].equal(before)
    verify(made, example, *[convolution(made.conv.weight, made.conv.bias)] * 2)
    assert len(said) == 1
