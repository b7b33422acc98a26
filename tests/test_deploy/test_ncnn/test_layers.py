"""Single calls as ncnn's layers, run in ncnn, against the formula of quantization in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from torch import nn
from torch.nn import functional

from mmdet_ptq.quantizers import AffineQuantizer

pytest.importorskip('ncnn', reason="needs ncnn: pip install 'mmdet-ptq[ncnn]'")

from mmdet_ptq.deploy.ncnn.format import NcnnLayer, write_network
from mmdet_ptq.deploy.ncnn.layers import (
    float_layers,
    fuse_activations,
    integer_layers,
    is_integer,
    rounded_layers,
    unrounded_layers,
)
from mmdet_ptq.deploy.ncnn.network import NcnnNetwork
from mmdet_ptq.deploy.ncnn.trace import LayerCall

CHANNELS = 6
IMAGE = (1, CHANNELS, 7, 9)
NARROW = dict(narrow_range=True)


def activation(bits=8, scale=0.05, zero=0, channels=None, **more):
    """A quantizer with these numbers; those per channel differ."""
    quantizer = AffineQuantizer(bits, num_channels=channels, **more)
    factor = 1 if channels is None else torch.linspace(1, 2, channels)
    quantizer.scale.data.copy_(torch.as_tensor(scale * factor))
    quantizer.zero_point.copy_(torch.as_tensor(zero))
    return quantizer


def levels_of(quantizer, x):
    """Values that a quantizer rounds to, by the formula."""
    shape = (-1, 1, 1) if quantizer.num_channels else ()
    scale, zero = (np.float64(part.detach().numpy()).reshape(shape) for part in (quantizer.scale, quantizer.zero_point))
    low, high = quantizer.code_range
    return torch.from_numpy((np.clip(np.rint(np.float64(x) / scale) + zero, low, high) - zero) * scale)


def call_of(module, quantizer, shape):
    rows = getattr(module, 'out_channels', None) or module.out_features
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-127, 128, (rows, module.weight[0].numel()), generator=generator, dtype=torch.int32)
    return LayerCall('layer', module, quantizer, integers, torch.linspace(0.001, 0.003, rows), '', shape)


def computed(call, x):
    """What a call gives of the values that its input is rounded to."""
    weight = (call.integers.double() * call.scale.double()[:, None]).view(call.module.weight.shape)
    module = copy.deepcopy(call.module).double()
    module.weight.data.copy_(weight)
    with torch.no_grad():
        return module(x)


def run(layers, shape, x, folder):
    """What ncnn gives of an image; the layers read the blob `x` and write `y`."""
    given = NcnnLayer('Input', 'in0', [], ['in0'])
    first = NcnnLayer('Noop', 'first', ['in0'], ['x'])
    last = NcnnLayer('Noop', 'last', ['y'], ['out0'])
    path = write_network([given, first, *layers, last], folder, {})
    network = NcnnNetwork(path, packing=False)
    (found,) = network.run(np.ascontiguousarray(x.reshape(shape[1:])))
    return torch.from_numpy(found)[None]


def image(shape=IMAGE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy() * 3


PLACE = NcnnLayer('opaque', 'ptq_0', ['x'], ['y'])
QUANTIZERS = dict(
    symmetric=activation(symmetric=True, **NARROW),
    clipped=activation(7, 0.1, 40),
    positive=activation(7, 0.05, 0),
    shifted=activation(zero=200, **NARROW),
    negated=activation(zero=30, **NARROW),
    channels=activation(channels=CHANNELS, symmetric=True, **NARROW),
    zeros=activation(7, 0.1, torch.tensor([5, 20, 60, 70, 100, 120]), CHANNELS),
    shared=activation(zero=190, channels=CHANNELS, shared_zero_point=True, **NARROW),
)


CONVOLUTIONS = dict(
    plain=nn.Conv2d(CHANNELS, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    depthwise=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    grouped=nn.Conv2d(CHANNELS, 8, 3, padding=1, groups=2, bias=False),
    adaptive=Conv2dAdaptivePadding(CHANNELS, CHANNELS, (2, 3), stride=2, groups=CHANNELS, bias=False),
)


@pytest.mark.parametrize(
    'module, quantizer',
    [
        pytest.param(module, quantizer, id=f'{name}-{kind}')
        for name, module in CONVOLUTIONS.items()
        for kind, quantizer in QUANTIZERS.items()
        # only depthwise convolutions read scales per channel
        if module.groups == CHANNELS or not quantizer.num_channels
    ],
)
def test_convolutions_give_the_formula(module, quantizer, tmp_path):
    call, x = call_of(module, quantizer, IMAGE), image()
    layers = integer_layers(call, PLACE)
    assert [layer.type for layer in layers if is_integer(layer)] == ['Convolution' + 'DepthWise' * (module.groups > 1)]
    expected = computed(call, levels_of(quantizer, x))
    found = run(layers, IMAGE, x, tmp_path)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('shape', [(1, 12), (1, 5, 12), (1, 4, 5, 12)], ids=['vector', 'rows', 'image'])
@pytest.mark.parametrize('kind', ['symmetric', 'clipped', 'shifted', 'negated'])
def test_linear_layers_take_vectors_rows_and_images(shape, kind, tmp_path):
    torch.manual_seed(0)
    call, x = call_of(nn.Linear(12, 5), QUANTIZERS[kind], shape), image(shape)
    layers = integer_layers(call, PLACE)
    assert [layer.type for layer in layers if is_integer(layer)] == ['InnerProduct']
    expected = computed(call, levels_of(QUANTIZERS[kind], x))
    found = run(layers, shape, x, tmp_path).reshape(expected.shape)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_channel_without_weights_gives_its_bias(tmp_path):
    call, x = call_of(nn.Conv2d(CHANNELS, 3, 1), QUANTIZERS['shifted'], IMAGE), image()
    call.integers[1], call.scale[1] = 0, 0
    found = run(integer_layers(call, PLACE), IMAGE, x, tmp_path)
    assert found[0, 1].unique().tolist() == [pytest.approx(call.module.bias[1].item())]
    expected = computed(call, levels_of(QUANTIZERS['shifted'], x))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('kind', QUANTIZERS)
def test_inputs_of_float_layers_are_rounded_to_their_codes(kind, tmp_path):
    call, x = call_of(nn.Conv2d(CHANNELS, 3, 1), QUANTIZERS[kind], IMAGE), image()
    found = run(rounded_layers(call, PLACE), IMAGE, x, tmp_path)
    torch.testing.assert_close(found, levels_of(QUANTIZERS[kind], x).float(), rtol=1e-5, atol=1e-5)
    assert run(unrounded_layers(call, PLACE), IMAGE, x, tmp_path).equal(torch.from_numpy(x))


@pytest.mark.parametrize('channels', [None, CHANNELS])
def test_codes_of_16_bits_are_clipped_alone(channels, tmp_path):
    quantizer = activation(16, 2e-5, 20000, channels)
    call, x = call_of(nn.Conv2d(CHANNELS, 3, 1), quantizer, IMAGE), image()
    found = run(rounded_layers(call, PLACE), IMAGE, x, tmp_path)
    scale = quantizer.scale.detach().view(-1, 1, 1)
    low, high = ((code - 20000) * scale for code in (0, 65535))
    clipped = torch.minimum(torch.maximum(torch.from_numpy(x), low), high)
    torch.testing.assert_close(found, clipped, rtol=1e-5, atol=1e-6)
    assert 0.2 < (clipped != torch.from_numpy(x)).float().mean() < 0.9


@pytest.mark.parametrize(
    'module, shape',
    [
        (nn.Conv2d(CHANNELS, 4, 3, stride=2, padding=1, dilation=(1, 2)), IMAGE),
        (nn.Conv2d(CHANNELS, 8, 3, groups=2, bias=False), IMAGE),
        (nn.Linear(9, 5, bias=False), IMAGE),
        (nn.Linear(9, 5), (1, 4, 9)),
    ],
    ids=['convolution', 'grouped', 'image', 'rows'],
)
def test_in_float_a_call_is_its_layer(module, shape, tmp_path):
    x, call = image(shape), call_of(module, QUANTIZERS['symmetric'], shape)
    layers = float_layers(call, PLACE)
    assert not any(map(is_integer, layers))
    with torch.no_grad():
        expected = module(torch.from_numpy(x))
    torch.testing.assert_close(run(layers, shape, x, tmp_path), expected, rtol=1e-4, atol=1e-4)


FUNCTIONS = dict(
    ReLU=({}, functional.relu),
    Clip=({0: '-0.25', 1: '0.5'}, lambda x: x.clamp(-0.25, 0.5)),
    Sigmoid=({}, torch.sigmoid),
    HardSwish=({0: '1.666667e-01'}, functional.hardswish),
)


@pytest.mark.parametrize('kind', FUNCTIONS)
@pytest.mark.parametrize('groups', [1, CHANNELS])
def test_activation_functions_are_taken_into_the_convolution(kind, groups, tmp_path):
    params, function = FUNCTIONS[kind]
    module = nn.Conv2d(CHANNELS, CHANNELS, 1, groups=groups)
    call, x = call_of(module, QUANTIZERS['symmetric'], IMAGE), image()
    layers = integer_layers(call, NcnnLayer('opaque', 'ptq_0', ['x'], ['sums']))
    layers.append(NcnnLayer(kind, 'activation', ['sums'], ['y'], params))
    fused = fuse_activations(layers)
    assert kind not in [layer.type for layer in fused] and len(fused) == len(layers) - 1
    expected = function(computed(call, levels_of(QUANTIZERS['symmetric'], x)))
    torch.testing.assert_close(run(fused, IMAGE, x, tmp_path), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'module, shape, after',
    [
        (nn.Linear(9, 5), IMAGE[:2] + (9,), NcnnLayer('ReLU', 'activation', ['sums'], ['y'])),
        (nn.Conv2d(CHANNELS, 4, 1), IMAGE, NcnnLayer('ReLU', 'activation', ['sums'], ['y'], {0: '0.1'})),
        (nn.Conv2d(CHANNELS, 4, 1), IMAGE, NcnnLayer('TanH', 'activation', ['sums'], ['y'])),
        # its sums get their scales in a layer behind it
        (nn.Conv2d(CHANNELS, 4, 1, groups=2), IMAGE, NcnnLayer('ReLU', 'activation', ['sums'], ['y'])),
    ],
    ids=['linear', 'leaky', 'another function', 'grouped'],
)
def test_what_no_int8_convolution_computes_stays_behind_it(module, shape, after):
    call = call_of(module, QUANTIZERS['symmetric'], shape)
    layers = [*integer_layers(call, NcnnLayer('opaque', 'ptq_0', ['x'], ['sums'])), after]
    assert fuse_activations(layers) == layers
    in_float = [*float_layers(call, NcnnLayer('opaque', 'ptq_0', ['x'], ['sums'])), after]
    assert fuse_activations(in_float) == in_float
