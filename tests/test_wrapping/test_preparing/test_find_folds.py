"""Which normalisations are folded and why others stay, told from small networks and from what a pass showed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.preparing.find_folds import find_folds
from mmdet_ptq.wrapping.watching.probe import Probe, probe_detector

UNFED = 'no single convolution feeds it, and nothing else'


class Net(nn.Module):
    """Modules of any names, and how they are called."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d, **options) -> nn.Module:
    module = kind(channels, **options)
    for value in (module.running_mean, module.weight, module.bias):
        if value is not None:
            nn.init.normal_(value)
    nn.init.uniform_(module.running_var, 0.2, 4)
    return module


def pair(conv: nn.Module, bn: nn.Module) -> Net:
    return Net(lambda m, x: m.bn(m.conv(x)), conv=conv, bn=bn)


def found(net: nn.Module, x: Tensor) -> tuple[list, dict]:
    return find_folds(net.eval(), probe_detector(net, lambda: net(x)))


@pytest.mark.parametrize(
    'conv, bn, shape',
    [
        (nn.Conv1d(3, 4, 3), norm(4, nn.BatchNorm1d), (2, 3, 9)),
        (nn.Conv3d(3, 4, 2), norm(4, nn.BatchNorm3d), (1, 3, 3, 4, 5)),
        (nn.Linear(3, 4), norm(4, nn.BatchNorm1d), (5, 3)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), norm(6), (1, 4, 3, 3)),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), norm(4, affine=False), (1, 4, 5, 5)),
        (nn.Conv2d(3, 4, 1), norm(4, nn.SyncBatchNorm), (1, 3, 5, 5)),
        (nn.Conv2d(1, 1, 1), norm(1, eps=0.5), (1, 1, 1, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)
def test_what_is_folded_computes_the_same_without_its_norm(conv, bn, shape):
    net, x = pair(conv, bn).double(), torch.randn(shape, dtype=torch.float64)
    folds, kept = found(net, x)
    assert (folds, kept) == ([('conv', 'bn')], {})
    with torch.no_grad():
        before = net(x)
        fold_norms(net, folds)
        torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-9)
    assert isinstance(net.bn, nn.Identity)


def test_folds_come_in_the_order_of_the_norms_in_the_detector():
    layers = {
        f'{kind}{i}': nn.Conv2d(3, 3, 1) if kind == 'conv' else norm(3) for i in (2, 0, 1) for kind in ('conv', 'bn')
    }
    net = Net(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(m.bn0(m.conv0(x)).relu())).relu())), **layers)
    folds, kept = found(net, torch.randn(1, 3, 4, 4))
    assert folds == [('conv2', 'bn2'), ('conv0', 'bn0'), ('conv1', 'bn1')] and kept == {}


@pytest.mark.parametrize(
    'run',
    [
        lambda m, x: m.conv(x),
        lambda m, x: m.bn(m.conv(x).add_(1)),
        lambda m, x: m.bn(m.conv(x)[:, :, 1:]),
        lambda m, x: m.bn(m.conv(x).transpose(2, 3)),
        lambda m, x: m.bn(m.conv(x).detach()),
        lambda m, x: m.bn(nn.functional.conv2d(x, m.conv.weight, m.conv.bias)),
        lambda m, x: m.bn(m.conv(x) if x.ndim == 3 else m.conv(x[0])[None]),
    ],
    ids=['not called', 'written to', 'cut', 'turned', 'detached', 'by its weight alone', 'image without batch'],
)
def test_a_norm_of_something_else_than_an_output_stays(run):
    net = Net(run, conv=nn.Conv2d(3, 3, 1), bn=norm(3))
    assert found(net, torch.randn(1, 3, 8, 8)) == ([], {'bn': UNFED})


def _without_gradients(m, x):
    y = m.conv(x)
    with torch.no_grad():
        seen = y.relu()
    return m.bn(y) + seen


@pytest.mark.parametrize(
    'run',
    [
        lambda m, x: (lambda y: m.bn(y) * (y > 0))(m.conv(x)),
        lambda m, x: (lambda y: m.bn(y) + y.data)(m.conv(x)),
        lambda m, x: (lambda y: m.bn(y) + y.detach().sigmoid())(m.conv(x)),
        lambda m, x: (lambda y: m.bn(y) + y.argmax(1, keepdim=True))(m.conv(x)),
        lambda m, x: (lambda y: m.bn(y) * y.max().item())(m.conv(x)),
        lambda m, x: (lambda y: (m.bn(y), dict(raw=[y])))(m.conv(x)),
        _without_gradients,
    ],
    ids=['compared', 'data', 'detached', 'argmax', 'a number', 'returned', 'without gradients'],
)
def test_a_norm_stays_where_the_output_is_read_and_no_gradient_shows_it(run):
    net = Net(run, conv=nn.Conv2d(3, 3, 1), bn=norm(3))
    assert found(net, torch.randn(1, 3, 8, 8)) == ([], {'bn': UNFED})


def test_to_ask_for_a_shape_reads_nothing():
    def run(m, x):
        y = m.conv(x)
        assert y.shape == x.shape and y.dim() == len(y.size()) and y.dtype == m.conv.weight.dtype
        return m.bn(y) + torch.zeros_like(y) + y.new_ones(1)

    assert found(Net(run, conv=nn.Conv2d(3, 3, 1), bn=norm(3)), torch.randn(1, 3, 8, 8)) == ([('conv', 'bn')], {})


@pytest.mark.parametrize(
    'run, told',
    [
        (lambda m, x: m.bn(m.conv(x)) + m.conv.bias.view(1, -1, 1, 1), 'the bias of its convolution conv'),
        (lambda m, x: m.bn(m.conv(x)) * m.conv.weight.abs().mean(), 'the weight of its convolution conv'),
        (lambda m, x: m.bn(m.conv(x)) * m.bn.weight.view(1, -1, 1, 1), 'its parameters or statistics'),
        (lambda m, x: m.bn(m.conv(x)) - m.bn.running_mean.view(1, -1, 1, 1), 'its parameters or statistics'),
        (lambda m, x: m.bn(m.conv(x.to(m.bn.bias.dtype))), 'its parameters or statistics'),
    ],
    ids=['bias', 'weight', 'gain', 'mean', 'type of a shift'],
)
def test_what_a_pair_holds_stays_where_something_else_reads_it(run, told):
    net = Net(run, conv=nn.Conv2d(3, 3, 1), bn=norm(3))
    assert found(net, torch.randn(1, 3, 8, 8)) == ([], {'bn': f'something else reads {told}'})


def test_a_copy_of_the_memory_alone_does_not_matter():
    net = Net(lambda m, x: m.bn(m.conv(x).contiguous()), conv=nn.Conv2d(3, 3, 1), bn=norm(3))
    assert found(net, torch.randn(1, 3, 8, 8)) == ([('conv', 'bn')], {})


def test_a_convolution_of_two_norms_keeps_both_and_is_named():
    net = Net(lambda m, x: m.one(m.conv(x)) + m.two(m.conv(2 * x)), conv=nn.Conv2d(3, 3, 1), one=norm(3), two=norm(3))
    told = 'its convolution conv is shared by several normalisations'
    assert found(net, torch.randn(1, 3, 8, 8)) == ([], dict(one=told, two=told))


def test_one_of_two_norms_of_a_detector_may_stay_alone():
    """What is said of one pair is not said of the other."""
    layers = dict(a=nn.Conv2d(3, 3, 1), b=norm(3), c=nn.Conv2d(3, 3, 1), d=norm(3))
    net = Net(lambda m, x: m.d(m.c(m.b(m.a(x)).relu()).relu()), **layers)
    assert found(net, torch.randn(1, 3, 8, 8)) == ([('a', 'b')], {'d': UNFED})


def test_a_weight_that_a_layer_holds_which_never_runs_stays():
    conv, idle = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    idle.weight = conv.weight
    net = Net(lambda m, x: m.bn(m.conv(x)), conv=conv, bn=norm(3), idle=idle)
    assert found(net, torch.randn(1, 3, 8, 8)) == (
        [],
        {'bn': 'something else reads the weight of its convolution conv'},
    )


def test_a_layer_with_two_names_is_one():
    conv, bn = nn.Conv2d(3, 3, 1), norm(3)
    net = Net(lambda m, x: m.alias_bn(m.alias(x)), conv=conv, bn=bn, alias=conv, alias_bn=bn).eval()
    x = torch.randn(1, 3, 8, 8)
    folds, kept = found(net, x)
    assert (folds, kept) == ([('conv', 'bn')], {})
    with torch.no_grad():
        before = net(x)
        fold_norms(net, folds)
        torch.testing.assert_close(net(x), before)


def test_a_bias_that_two_convolutions_have_stays_the_other_ones():
    conv, other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    other.bias = conv.bias
    net = Net(lambda m, x: m.bn(m.conv(x)) + m.other(x), conv=conv, bn=norm(3), other=other).eval()
    x = torch.randn(1, 3, 8, 8)
    folds, _ = found(net, x)
    assert folds == [('conv', 'bn')]
    folded = copy.deepcopy(net)
    fold_norms(folded, folds)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), net(x))


def test_other_normalisations_are_no_matter_of_folding():
    net = Net(
        lambda m, x: m.c(m.b(m.a(m.conv(x)))),
        conv=nn.Conv2d(4, 4, 1),
        a=nn.GroupNorm(2, 4),
        b=nn.InstanceNorm2d(4),
        c=nn.LayerNorm(8),
    )
    assert found(net, torch.randn(1, 4, 8, 8)) == ([], {})


@pytest.mark.parametrize(
    'showed, told',
    [
        (dict(norms=[], direct={'conv'}), UNFED),
        (dict(norms=[('conv', 'bn'), ('other', 'bn')], direct={'conv', 'other'}), UNFED),
        (dict(norms=[('conv', 'bn'), ('conv', 'bn2')], direct={'conv'}), 'its convolution conv is shared by several'),
        (dict(norms=[('conv', 'bn')], direct={'other'}), 'its convolution conv transforms its weight'),
        (dict(norms=[('conv', 'bn'), ('conv', 'bn')], direct={'conv'}), None),
    ],
    ids=['nothing', 'two convolutions', 'two norms', 'not direct', 'twice'],
)
def test_what_the_pass_showed_decides(showed, told):
    net = Net(None, conv=nn.Conv2d(3, 3, 1), other=nn.Conv2d(3, 3, 1), bn=norm(3), bn2=norm(3))
    folds, kept = find_folds(net, Probe(**showed))
    assert folds == ([] if told else [('conv', 'bn')])
    assert kept.get('bn', '').startswith(told or '') and ('bn' in kept) == bool(told)


def test_a_weight_that_the_pass_saw_borrowed_stays():
    net = pair(nn.Conv2d(3, 3, 1), norm(3))
    probe = Probe(norms=[('conv', 'bn')], direct={'conv'}, borrowed={id(net.conv.weight)})
    assert find_folds(net, probe) == ([], {'bn': 'something else reads the weight of its convolution conv'})
