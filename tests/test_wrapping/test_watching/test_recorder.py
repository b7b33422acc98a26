"""One forward pass, operation by operation: what is seen, by which names, and that nothing is left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdet_ptq.wrapping.watching.operations import ARITHMETIC, LAYER, MOVEMENT, UNKNOWN
from mmdet_ptq.wrapping.watching.recorder import record_operations


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.a(x)
        x = F.relu(x) + self.b(x)
        return torch.cat([x, x.exp()], 1)


def recorded(net, *shape):
    net = net.eval()
    return record_operations(net, lambda: net(torch.randn(*(shape or (1, 3, 4, 4)))))


def test_layers_and_functions_are_seen_in_their_order():
    operations = recorded(Net()).operations
    assert [(op.kind, op.name) for op in operations] == [
        (LAYER, 'a'),
        (ARITHMETIC, 'relu'),
        (LAYER, 'b'),
        (ARITHMETIC, 'add'),
        (UNKNOWN, 'exp'),
        (MOVEMENT, 'cat'),
    ]
    a, relu, b, add, exp, cat = operations
    assert relu.inputs == a.outputs == b.inputs and relu.clips
    assert add.inputs == [*relu.outputs, *b.outputs]
    assert cat.joins and cat.inputs == [*add.outputs, *exp.outputs]


def test_calls_of_one_module_are_told_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

        def forward(self, x):
            return self.inner(self.inner(x))

    operations = recorded(Twice()).operations
    assert [op.place for op in operations if op.kind == LAYER] == [('inner.0', 0), ('inner.0', 1)]
    assert [op.place[:2] for op in operations if op.name == 'relu'] == [('inner.1', 0), ('inner.1', 1)]


def test_operations_inside_a_layer_are_its_own_business():
    assert not [op for op in recorded(Net()).operations if op.name == 'conv2d']


@pytest.mark.parametrize(
    ('change', 'overwrites'),
    [
        (lambda x: x.relu_(), False),  # goes on with the result
        (lambda x: (x.relu_(), x)[1], True),  # goes on under the old name
        (lambda x: (x[:, :1].add_(1), x)[1], False),
    ],
)
def test_what_is_changed_in_place_and_read_under_its_old_name_is_told(change, overwrites):
    class InPlace(Net):
        def forward(self, x):
            return self.b(change(self.a(x)))

    recorder = recorded(InPlace())
    assert any(op.overwrites for op in recorder.operations) is overwrites
    assert all(op.kind == UNKNOWN for op in recorder.operations if op.overwrites)


def test_a_function_with_a_kernel_of_its_own_is_seen_by_what_reads_it():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch._C.DisableTorchFunction():  # as a kernel of its own is not seen
                return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Custom(Net):
        def forward(self, x):
            return self.b(Doubled.apply(self.a(x)))

    a, custom, b = recorded(Custom()).operations
    assert (custom.kind, custom.name) == (UNKNOWN, 'Doubled')
    assert set(custom.inputs) == set(a.outputs) and custom.outputs == b.inputs


def test_nothing_is_left_behind_whatever_happens():
    net = Net().eval().requires_grad_(False)

    def fail():
        net(torch.randn(1, 3, 4, 4))
        raise RuntimeError('as a detector may')

    with pytest.raises(RuntimeError, match='as a detector may'):
        record_operations(net, fail)
    assert torch._C._len_torch_function_stack() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
