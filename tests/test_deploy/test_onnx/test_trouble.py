"""Where an export failed: the module as the detector names it, and the line of its code."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdet_ptq.deploy.onnx.trouble import failing_place

X = (torch.randn(2, 3),)
CAUSE = 'no function for <OpOverload aten.special_erfcx>, sorry'


class Stubborn(nn.Module):
    def forward(self, x):
        return x.reshape(7, 7)


class Network(nn.Module):
    """Keeps the detector as exported networks do."""

    def __init__(self, part):
        super().__init__()
        self.detector = nn.ModuleDict(dict(backbone=nn.Identity(), neck=nn.Sequential(nn.ReLU(), part)))

    def forward(self, x):
        return self.detector['neck'](self.detector['backbone'](x))


class Target:
    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f'<OpOverload {self.name}>'


@pytest.fixture
def captured(monkeypatch):
    """Runs a network where it would be captured, which takes a second; then it is said to consist of some nodes."""
    nodes = []

    def capture(network, inputs, strict):
        network(*inputs)
        return SimpleNamespace(run_decompositions=lambda: SimpleNamespace(graph=SimpleNamespace(nodes=nodes)))

    monkeypatch.setattr(torch.export, 'export', capture)
    return nodes


def node(name, **meta):
    return SimpleNamespace(op='call_function', target=Target(name), meta=meta)


def frames(*places):
    return ''.join(f'File "{file}", line {line}, in forward\n    code\n' for file, line in places)


def test_a_module_that_cannot_be_captured_is_named_with_its_line(captured):
    first = inspect.getsourcelines(Stubborn)[1]
    assert failing_place(Network(Stubborn()), X, 'whatever was said') == f'neck.1, line {first + 2} of test_trouble.py'


def test_an_operation_that_the_exporter_names_is_one_of_a_module(captured):
    stack = dict(a=('', 'Network'), b=('detector.neck', 'Sequential'), c=('detector.neck.1', 'Erf'))
    told = frames(('/x/net.py', 3), ('/x/site-packages/mmcv/ops/nms.py', 27), (f'{torch.__path__[0]}/nn/f.py', 9))
    captured += [
        SimpleNamespace(op='placeholder', target=Target('aten.special_erfcx'), meta={}),
        node('aten.relu', nn_module_stack=dict(a=('detector.neck.0', '')), stack_trace=frames(('/x/other.py', 1))),
        node('aten.special_erfcx', nn_module_stack=stack, stack_trace=told),
        node('aten.special_erfcx', nn_module_stack=dict(a=('detector.head', '')), stack_trace=told),
    ]
    # the first of them; of the lines the innermost that is neither torch's nor ours
    assert failing_place(Network(nn.ReLU()), X, CAUSE) == 'neck.1, line 27 of mmcv/ops/nms.py'


def test_what_cannot_be_found_is_not_told(captured):
    assert failing_place(Network(nn.ReLU()), X, CAUSE) == ''
    captured += [node('aten.relu', nn_module_stack=dict(a=('detector.neck.0', ''))), node('aten.special_erfcx')]
    assert failing_place(Network(nn.ReLU()), X, CAUSE) == ''
    # a module without a line, and a line without a module
    captured.append(node('aten.abs', nn_module_stack=dict(a=('detector.neck.0', '')), stack_trace=None))
    captured.append(node('aten.neg', stack_trace=frames(('/x/net.py', 3))))
    assert failing_place(Network(nn.ReLU()), X, '<OpOverload aten.abs>') == 'neck.0'
    assert failing_place(Network(nn.ReLU()), X, '<OpOverload aten.neg>') == 'line 3 of net.py'


@pytest.mark.parametrize('part', [Stubborn, nn.ReLU])
def test_no_hook_is_left_in_the_network(captured, part):
    network = Network(part())
    failing_place(network, X, '')
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
