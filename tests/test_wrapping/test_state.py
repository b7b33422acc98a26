"""The state that a quantized detector carries: what its modes change, what is mixed, shared, recorded and put back."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer, MinMaxObserver
from mmdet_ptq.wrapping.inputs import attach_inputs
from mmdet_ptq.wrapping.state import (
    ChannelDivision,
    QuantizationState,
    mixed,
    only_read_tensors,
    quantization_mode,
    quantize_only,
    with_input,
)
from mmdet_ptq.wrapping.weights import attach_weight, quantized_weights


def quantizer(high=4.0, **options):
    built = AffineQuantizer(bits=4, **options)
    built.set_range(torch.full(built.param_shape, -high), torch.full(built.param_shape, high))
    return built


def state(**readers):
    return QuantizationState({name: quantizer() for name in readers}, readers)


@pytest.fixture
def net():
    """Two layers, each with a quantized weight and an input of its own; nothing reads the third tensor."""
    net = nn.ModuleDict(dict(a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    for layer in net.values():
        attach_weight(layer, quantizer(num_channels=3, channel_axis=0))
    attach_inputs(net, state(x=1, y=1, between=0), {'a': ['x'], 'b': ['y']})
    return net


@pytest.mark.parametrize(('shape', 'axis'), [((2, 3, 4, 5), 1), ((2, 4, 3), -1), ((3,), 0)])
def test_channels_are_divided_along_their_axis(shape, axis):
    division, x = ChannelDivision(3, axis), torch.randn(shape)
    assert torch.equal(division(x), x)
    division.load_state_dict(dict(factor=torch.tensor([2.0, 4.0, 0.5])))
    expected = np.moveaxis(np.moveaxis(x.numpy(), axis, -1) / np.float32([2, 4, 0.5]), -1, axis)
    np.testing.assert_array_equal(division(x).numpy(), expected)


def test_a_share_of_the_values_is_taken_from_the_other_tensor():
    x, other = torch.randn(3, 7), torch.randn(3, 7)
    assert torch.equal(mixed(x, other, 0.0), x)
    for share in (0.999, 1.0):  # to 1/256 that is all
        assert torch.equal(mixed(x, other, share), other)
    x, other = torch.zeros(50, 999, requires_grad=True), torch.ones(50, 999)
    out = mixed(x, other, 0.25)
    assert set(out.unique().tolist()) == {0, 1}
    # five standard deviations
    assert out.mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / out.numel()) ** 0.5)
    out.sum().backward()
    assert torch.equal(x.grad, 1 - out)


def test_a_quantized_tensor_is_let_go_with_its_last_reader():
    held, x = state(x=3), torch.randn(5)
    first = held.read('x', x, 'a')
    assert held.read('x', x, 'b') is first and held.read('x', x, 'c') is first
    again = held.read('x', x, 'a')
    assert again is not first and torch.equal(again, first)
    held.reset()
    assert held.read('x', x, 'b') is not again


def test_what_is_recorded_is_no_longer_written_to():
    held, x = state(x=1, y=1), torch.randn(5)
    before, held.recorded = x.clone(), []
    for name in ('y', 'x'):
        held.observe(name, x, 'anywhere').add_(1)
    x.mul_(2)
    assert [name for name, _ in held.recorded] == ['y', 'x']
    assert all(torch.equal(tensor, before) for _, tensor in held.recorded)


def test_a_tensor_that_cannot_be_observed_is_told_with_its_place():
    held = state(x=1)
    held.mode, held.observers = 'observe', {'x': MinMaxObserver()}
    with pytest.raises(PTQError, match='^input of layer neck.conv: .*NaN or infinity'):
        held.read('x', torch.tensor([1.0, torch.nan]), 'neck.conv')


def test_the_next_call_is_set_for_the_named_layers_and_forgotten_with_the_pass():
    held = state(x=1)
    held.hooks = [SimpleNamespace(layer=layer, calls=1) for layer in ('a', 'b', 'a')]
    held.set_calls({'a': 5, 'stranger': 7})
    assert [hook.calls for hook in held.hooks] == [5, 1, 5]
    held.reset()
    assert [hook.calls for hook in held.hooks] == [0, 0, 0]


def test_the_input_of_a_layer_is_its_first_argument_however_it_is_given():
    assert with_input((1, 2), dict(z=3), str) == (('1', 2), dict(z=3))
    given = dict(input=1, z=3)
    assert with_input((), given, str) == ((), dict(input='1', z=3)) and given['input'] == 1


def test_a_block_of_code_ends_in_the_mode_that_it_began_in(net):
    def quantized():
        return [name for name, weight in quantized_weights(net).items() if weight.enabled]

    with pytest.raises(KeyError), quantization_mode(net, 'observe'):
        assert net.ptq.mode == 'observe' and quantized() == []
        with quantize_only(net, ['y'], ['b']):
            assert (net.ptq.mode, net.ptq.only, quantized()) == ('quantize', {'y'}, ['b'])
        assert (net.ptq.mode, net.ptq.only, quantized()) == ('observe', None, [])
        with only_read_tensors(net):
            assert (net.ptq.mode, net.ptq.only, quantized()) == ('quantize', {'x', 'y'}, ['a', 'b'])
            raise KeyError
    assert (net.ptq.mode, net.ptq.only, quantized()) == ('quantize', None, ['a', 'b'])
    with quantization_mode(nn.Linear(3, 3), 'no mode at all'):  # a float detector has none
        pass
