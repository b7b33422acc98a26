"""Calls of quantized layers as opaque operators, and the copy of a detector that has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy.ncnn.trace import (
    Calls,
    IntegerCall,
    LayerCall,
    RoundedInput,
    StridedSlices,
    borders,
    obstacle,
    opaque_type,
    trace,
    traceable,
)
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.wrapping import prepare_detector
from mmdet_ptq.wrapping.state import STATE

EIGHT = AffineQuantizer(8, narrow_range=True)
CODES = torch.tensor([[-127, 127]], dtype=torch.int32)


def call_of(module, activation=EIGHT, integers=CODES):
    return LayerCall('layer', module, activation, integers, torch.ones(1), obstacle(module, activation, integers))


@pytest.mark.parametrize('size', [(1, 1), (5, 8), (9, 7)])
@pytest.mark.parametrize(
    'options',
    [
        dict(kernel_size=3),
        dict(kernel_size=(2, 5), stride=(3, 2)),
        dict(kernel_size=3, stride=2, dilation=(3, 1)),
        dict(kernel_size=1, stride=3),
    ],
)
def test_borders_of_adaptive_padding_are_those_that_it_pads(options, size):
    module = Conv2dAdaptivePadding(2, 3, **options)
    x = torch.randn(1, 2, *size)
    top, bottom, left, right = borders(module, tuple(x.shape))
    padded = nn.functional.pad(x, (left, right, top, bottom))
    own = nn.functional.conv2d(padded, module.weight, module.bias, module.stride, 0, module.dilation)
    torch.testing.assert_close(own, module(x))
    assert 0 <= bottom - top <= 1 and 0 <= right - left <= 1


def test_borders_of_a_plain_convolution_are_its_padding():
    assert borders(nn.Conv2d(2, 3, 3, padding=(4, 1)), (1, 2, 9, 9)) == (4, 4, 1, 1)


@pytest.mark.parametrize(
    'module, activation, integers, reason',
    [
        (nn.Linear(2, 1), EIGHT, CODES, ''),
        (nn.Conv2d(2, 1, 1), EIGHT, CODES, ''),
        (Conv2dAdaptivePadding(2, 1, 3), EIGHT, CODES - 1, ''),
        (nn.Linear(2, 1), None, CODES, 'its input is float'),
        (nn.Linear(2, 1), EIGHT, None, 'its weight is float'),
        (nn.Linear(2, 1), EIGHT, CODES + 1, 'it has more than 8 bits'),
        (nn.Linear(2, 1), EIGHT, CODES - 2, 'it has more than 8 bits'),
        (nn.Linear(2, 1), AffineQuantizer(16), CODES, 'it has more than 8 bits'),
        (nn.ConvTranspose2d(2, 1, 2), EIGHT, CODES, 'ncnn has no int8 ConvTranspose2d'),
        (nn.Conv1d(2, 1, 1), EIGHT, CODES, 'ncnn has no int8 Conv1d'),
        (nn.Conv2d(2, 1, 3, padding='same'), EIGHT, CODES, "its padding is 'zeros', 'same'"),
        (nn.Conv2d(2, 1, 3, padding=1, padding_mode='reflect'), EIGHT, CODES, "its padding is 'reflect', (1, 1)"),
    ],
)
def test_obstacles_are_told(module, activation, integers, reason):
    assert obstacle(module, activation, integers) == reason
    assert call_of(module, activation, integers).integer == (not reason)


@pytest.mark.parametrize(
    'module, shape',
    [
        (nn.Conv2d(6, 4, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (1, 6, 9, 8)),
        (nn.Conv2d(6, 12, 3, stride=2, groups=3), (2, 6, 10, 7)),
        (Conv2dAdaptivePadding(6, 4, 3, stride=2), (1, 6, 5, 8)),
        (nn.Linear(6, 4), (1, 6)),
        (nn.Linear(6, 4), (2, 5, 6)),
        (nn.Linear(6, 9), (1, 3, 4, 6)),
    ],
)
def test_what_stands_for_a_call_has_the_shape_of_its_output_and_no_weight(module, shape):
    call, x = call_of(module), torch.randn(shape)
    operator = IntegerCall(call)
    assert operator(x).shape == module(x).shape
    assert call.shape == shape
    assert not list(operator.parameters()) and not list(operator.children())
    rounded = RoundedInput(call)(x)
    assert rounded.equal(x) and rounded is not x


def test_calls_of_a_layer_run_in_turn_and_each_is_of_a_type_of_its_own():
    layer = nn.Conv2d(3, 4, 1)
    calls = Calls(
        {'ptq_0': call_of(layer), 'ptq_1': call_of(layer, AffineQuantizer(16)), 'ptq_2': call_of(layer, None)}
    )
    x = torch.randn(1, 3, 5, 5)
    for _ in range(2):
        first, second, third = (calls(x) for _ in range(3))
        assert first.shape == layer(x).shape and not torch.allclose(first, layer(x))
        assert second.equal(layer(x)) and third.equal(layer(x))
    names = {name: type(child) for name, child in calls.named_children()}
    assert names.keys() == {'ptq_0', 'layer', 'ptq_1'}  # nothing stands for what is float
    kinds = dict(ptq_0=IntegerCall, ptq_1=RoundedInput)
    for name, kind in kinds.items():
        made = names[name]
        assert issubclass(made, kind) and opaque_type(kind, name) == f'{made.__module__}.{made.__qualname__}'


INDICES = [
    np.s_[..., ::2, 1::2],
    np.s_[:, :, 1:7:3, :],
    np.s_[:, 1:, ::2, ::3],
    np.s_[:, ..., ::4],
    np.s_[:, :, ::2],
    np.s_[:, :, :, 2:-1:2],
]


@pytest.mark.parametrize('index', INDICES, ids=str)
def test_slices_with_steps_are_the_same_values_without_one(index):
    x = torch.randn(2, 3, 8, 9)
    expected = torch.from_numpy(x.numpy()[index])
    module = nn.Module()
    module.forward = lambda x: x[index]
    with StridedSlices():
        assert x[index].equal(expected)
        traced = torch.jit.trace(module, x, check_trace=False)
    assert traced(x).equal(expected)
    graph = traced.inlined_graph  # which its nodes do not keep
    slices = graph.findAllNodes('aten::slice')
    assert slices and all(list(node.inputs())[4].toIValue() == 1 for node in slices)


def test_other_indices_stay_as_they_are():
    x, rows = torch.randn(3, 4, 8), torch.randn(2, 3, 8, 9)
    with StridedSlices():
        assert x[..., ::2].equal(torch.from_numpy(x.numpy()[..., ::2]))
        for index in (np.s_[::2], np.s_[:, 0, ::2], np.s_[..., None, ::2], np.s_[1], np.s_[:, [2, 0], ::3]):
            assert rows[index].equal(torch.from_numpy(rows.numpy()[index]))


class Shared(nn.Module):
    """A detector whose layers run once, twice, and in float."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.norm = nn.BatchNorm2d(2)
        self.again = self.stem  # one module under two names

    def data_preprocessor(self, data, training):
        return data

    def forward(self, inputs, data_samples=None, mode='predict'):
        x = self.stem(inputs).relu()
        x = self.head(self.head(x).relu() + 3)
        return [self.norm(self.up(x.relu()).sigmoid()), x]


@pytest.fixture
def detector():
    torch.manual_seed(0)
    made, batch = Shared().eval(), torch.randn(2, 3, 8, 8)
    minmax = dict(type='mmdet_ptq.MinMaxObserver')
    ptq = dict(preset='w8a8_observe', activations=dict(observer=minmax, quantizer=dict(narrow_range=True)))
    structure = prepare_detector(made, PTQConfig.from_dict(ptq), lambda: made(batch))
    observe_activations(made, [dict(inputs=batch)], structure)
    return made


def test_a_copy_has_an_operator_for_each_call(detector):
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    kinds = {name: type(module) for name, module in detector.named_modules()}
    twin, calls = traceable(detector)
    assert {name: call.layer for name, call in calls.items()} == dict(
        ptq_0='stem', ptq_1='head#0', ptq_2='head#1', ptq_3='up'
    )
    assert [call.reason for call in calls.values()] == ['', '', '', 'ncnn has no int8 ConvTranspose2d']
    assert calls['ptq_1'].activation is not calls['ptq_2'].activation
    assert type(twin.stem) is Calls and twin.again is twin.stem and not hasattr(twin, STATE)
    for call in calls.values():
        shape = call.module.weight.shape
        quantized = detector.get_submodule(call.layer.partition('#')[0]).weight.detach()
        assert call.module.weight.equal(quantized)
        if call.integer:
            values = (call.integers * call.scale[:, None]).view(shape)
            torch.testing.assert_close(values, quantized, rtol=1e-6, atol=1e-7)
            assert call.integers.abs().max() <= 128 and call.scale.shape == shape[:1]
    # the detector itself is as it was
    assert {name: type(module) for name, module in detector.named_modules()} == kinds
    assert all(value.equal(before[name]) for name, value in detector.state_dict().items())


def test_a_trace_has_the_shapes_of_the_outputs_and_knows_those_of_the_inputs(detector):
    twin, calls = traceable(detector)
    example = torch.randn(1, 3, 8, 8)
    outputs = trace(twin, example)(example)
    assert [tuple(out.shape) for out in outputs] == [(1, 2, 16, 16), (1, 4, 8, 8)]
    assert [call.shape for call in calls.values()] == [(1, 3, 8, 8), *[(1, 4, 8, 8)] * 3]


def test_what_cannot_be_traced_is_refused_in_one_line(detector):
    twin, _ = traceable(detector)
    twin.norm = nn.BatchNorm2d(3).eval()
    told = r'^the detector cannot be traced on images of \(1, 3, 8, 8\): .*should contain'
    with pytest.raises(PTQError, match=told) as error:
        trace(twin, torch.zeros(1, 3, 8, 8))
    assert '\n' not in str(error.value)


def test_an_error_that_says_nothing_is_told_by_its_type(detector):
    twin, _ = traceable(detector)

    def refuse(*args, **kwargs):
        raise NotImplementedError

    twin.forward = refuse
    with pytest.raises(PTQError, match='cannot be traced on images of .*: NotImplementedError$'):
        trace(twin, torch.zeros(1, 3, 8, 8))
