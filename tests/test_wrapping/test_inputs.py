"""Inputs of layers: which quantizer a call gets, once per tensor, and what a layer sees in each mode."""

import copy

import pytest
import torch
from torch import nn

from mmdet_ptq.quantizers import AffineQuantizer, MinMaxObserver
from mmdet_ptq.wrapping import set_mode
from mmdet_ptq.wrapping.inputs import QuantizedInput, attach_inputs, divisions_of
from mmdet_ptq.wrapping.state import STATE, ChannelDivision, QuantizationState


def quantizer(high=1.0):
    built = AffineQuantizer(bits=8, symmetric=False)
    built.set_range(torch.tensor(-high), torch.tensor(high))
    return built


class Net(nn.Module):
    """One layer called twice, and two layers that read one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.shared(self.a(x) + self.b(x)), self.shared(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().eval()
    state = QuantizationState({'x': quantizer(), 'sum': quantizer(4.0)}, {'x': 2, 'sum': 1})
    attach_inputs(net, state, {'a': ['x'], 'b': ['x'], 'shared': ['sum', None]})
    return net


@pytest.fixture
def seen(net):
    """What the layers read, in the order of their calls."""
    read = []
    for layer in (net.a, net.b, net.shared):
        layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    return read


def test_each_call_of_a_layer_has_its_own_quantizer(net, seen):
    x = torch.randn(3, 4)
    net(x)
    quantized = net.ptq.activations['x'](x)
    assert torch.equal(seen[0], quantized)
    total = net.a(quantized) + net.b(quantized)
    assert torch.equal(seen[2], net.ptq.activations['sum'](total))
    assert seen[3] is x  # the second call of the shared layer stays float


def test_every_forward_pass_begins_with_the_first_call(net, seen):
    x = torch.randn(3, 4)
    first, second = net(x), net(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_layers_that_read_one_tensor_get_one_quantized_tensor(net, seen, monkeypatch):
    calls = []
    forward = AffineQuantizer.forward
    monkeypatch.setattr(AffineQuantizer, 'forward', lambda self, x: calls.append(1) or forward(self, x))
    net(torch.randn(3, 4))
    assert seen[0] is seen[1] and len(calls) == 2


def test_a_tensor_that_was_changed_in_place_is_quantized_again(net):
    x = torch.randn(3, 4)
    state = getattr(net, STATE)
    first = state.read('x', x, 'a')
    x.add_(0.3)
    assert not torch.equal(state.read('x', x, 'b'), first)


def test_modes_observe_and_pass(net, seen):
    x = torch.randn(3, 4)
    state = getattr(net, STATE)
    state.observers = {name: MinMaxObserver() for name in state.activations}
    set_mode(net, 'observe')
    net(x)
    assert seen[0] is x
    low, high = (float(value) for value in state.observers['x'].range(8, symmetric=False))
    assert low <= x.min() and high >= x.max()
    set_mode(net, 'float')
    seen.clear()
    net(x)
    assert seen[0] is x and seen[1] is x


def test_a_keyword_argument_is_quantized_as_well(net):
    state = getattr(net, STATE)
    hook = QuantizedInput(state, 'a', ['x'])
    x = torch.randn(2, 4)
    args, kwargs = hook(net.a, (), dict(input=x))
    assert args == () and torch.equal(kwargs['input'], state.activations['x'](x))


def test_a_deep_copy_refers_to_its_own_state(net):
    twin = copy.deepcopy(net)
    twin.ptq.activations['x'].set_range(torch.tensor(-0.1), torch.tensor(0.1))
    x = torch.randn(3, 4)
    assert not torch.equal(net(x)[0], twin(x)[0])
    assert all(hook.state is twin.ptq for hook in twin.ptq.hooks)


def test_a_division_is_found_by_its_layer_and_holds_in_float_too():
    net, division = Net().eval(), ChannelDivision(4, -1)
    division.factor.copy_(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    state = QuantizationState({'x': quantizer()}, {'x': 2}, divisions={'x': division})
    attach_inputs(net, state, {'a': ['x'], 'b': ['x']})
    assert divisions_of(state, ['a', 'shared']) == {'a': division}
    set_mode(net, 'float')
    read = []
    net.a.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    x = torch.randn(3, 4)
    net(x)
    assert torch.equal(read[0], x / division.factor)
