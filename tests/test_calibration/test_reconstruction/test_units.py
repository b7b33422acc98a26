from collections import Counter

import pytest
import torch
from architectures import register
from torch import nn

from mmdet_ptq.calibration.reconstruction.units import find_passages, find_units
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import predict_aligned
from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.testing import KINDS, tiny_batch, tiny_quantized
from mmdet_ptq.wrapping import quantization_mode
from mmdet_ptq.wrapping.weights import attach_weight, quantized_weights


def units_of(detector, **kwargs):
    data = detector.data_preprocessor(tiny_batch(1), False)
    images = data['inputs'].requires_grad_()
    with quantization_mode(detector, 'float'):
        return find_units(detector, lambda: predict_aligned(detector, images, data['data_samples']), **kwargs)


@pytest.mark.parametrize('granularity', ['block', 'layer', 'paper'])
@pytest.mark.parametrize(
    'kind', [pytest.param(k, marks=() if k in ('retinanet', 'faster_rcnn') else pytest.mark.thorough) for k in KINDS]
)
def test_every_quantized_layer_that_runs_is_in_one_unit(kind, granularity):
    detector, structure = tiny_quantized(kind)
    units = units_of(detector, granularity=granularity)
    count = Counter(layer for unit in units for layer in unit.layers)
    assert set(count.values()) == {1}
    # modules under several names (RTMDet) count under the first
    ran = {layer.name for layer in structure.layers if layer.inputs} & set(quantized_weights(detector))
    assert set(count) == ran
    if granularity == 'layer':
        assert all(len(unit.layers) == 1 for unit in units)
    if granularity == 'paper':
        assert all(len(unit.layers) == 1 for unit in units if not unit.name.startswith('backbone'))
    if granularity != 'layer':
        assert any(len(unit.layers) > 1 for unit in units)


def test_blocks_of_a_resnet_and_levels_of_a_shared_head():
    detector, _ = tiny_quantized('retinanet')
    units = {unit.name: unit for unit in units_of(detector)}
    assert set(units['backbone.layer2.0'].layers) == {
        f'backbone.layer2.0.{name}' for name in ('conv1', 'conv2', 'downsample.0')
    }
    tower = units['bbox_head.cls_convs.0']
    assert tower.calls == 3 and tower.layers == {'bbox_head.cls_convs.0.conv': 1}
    assert units['backbone.layer1.1'].needs == [{('backbone.layer1.0', 0)}]
    assert units['backbone.conv1'].needs == [set()]
    # the lateral sums: level 0 of the pyramid is made of both lateral convolutions
    assert units['neck.fpn_convs.0'].needs == [{('neck.lateral_convs.0', 0), ('neck.lateral_convs.1', 0)}]


def test_a_named_module_is_a_unit_and_a_wrong_name_an_error():
    detector, _ = tiny_quantized('retinanet')
    units = {unit.name for unit in units_of(detector, granularity='layer', patterns=['backbone.layer1'])}
    assert 'backbone.layer1' in units and not any(n.startswith('backbone.layer1.') for n in units)
    with pytest.raises(PTQError, match=r"names 'backbone.layr1'.*Did you mean"):
        units_of(detector, patterns=['backbone.layr1'])


def test_a_layer_that_also_runs_elsewhere_keeps_its_module_from_being_a_unit(quantized_pair):
    detector, run = quantized_pair
    names = [unit.name for unit in find_units(detector, run)]
    assert names == ['block.a', 'block.b']


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.b(self.a(x))


class _Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = _Block()

    def forward(self, x):
        return self.block(x) + self.block.a(x)


@pytest.fixture
def quantized_pair():
    net = _Pair().eval()
    for layer in (net.block.a, net.block.b):
        quantizer = AffineQuantizer(8, True, 3, 0)
        quantizer.fit_weight(layer.weight.detach().flatten(1))
        attach_weight(layer, quantizer)
    return net, lambda: net(torch.randn(1, 3, 4, 4, requires_grad=True))


class _Between(nn.Module):
    """Two branches and modules around their layers; one of these modules runs twice, one returns two tensors."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.left = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
        self.right, self.pool, self.split = nn.Conv2d(3, 3, 1), nn.MaxPool2d(1), _Split()

    def forward(self, x):
        x = self.act(self.stem(x))
        left, right = self.left(x), self.act(self.right(x))
        return self.split(self.pool(left + right))


class _Split(nn.Module):
    def forward(self, x):
        return x, x


def test_what_lies_between_units_and_what_it_is_made_of():
    detector = _Between()
    for layer in (detector.stem, detector.left[0], detector.left[2], detector.right):
        attach_weight(layer, AffineQuantizer(8, True, 3, 0))
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    units = find_units(detector, lambda: detector(images), 'layer')
    passages = {p.name: p.made_of for p in find_passages(detector, lambda: detector(images), units)}
    left = {('left.2', 0)}
    assert passages == {
        'act': [{('stem', 0)}, {('right', 0)}],
        'left': [left],
        'left.1': [{('left.0', 0)}],
        'pool': [left | {('right', 0)}],
    }


class _Steered(nn.Module):
    """A layer whose input another layer changes in a way that autograd does not tell."""

    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.last, self.join = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), join

    def forward(self, x):
        return self.last(self.join(self.a(x), self.b(x)))


def _no_grad(a, b):
    with torch.no_grad():
        factor = b.sigmoid() * 2
    return a * factor


def _written(a, b):
    mask = torch.ones(a.shape)
    mask[0][b[0].detach() > 0] = 0
    return a * mask


def _steered_needs(join):
    detector = _Steered(join)
    for layer in (detector.a, detector.b, detector.last):
        attach_weight(layer, AffineQuantizer(8, True, 3, 0))
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    return {unit.name: unit.needs for unit in find_units(detector, lambda: detector(images))}['last']


@pytest.mark.parametrize(
    'join',
    [
        lambda a, b: a + b.detach(),
        lambda a, b: a + b.data,
        lambda a, b: a * (b > 0),
        lambda a, b: a * float(b.mean()),
        lambda a, b: a[:, b.mean((0, 2, 3)).argsort()],
        lambda a, b: a.clone().masked_fill_(b.detach() > 0, 0),
        _no_grad,
        _written,
    ],
    ids=['detach', 'data', 'mask', 'number', 'index', 'in place', 'no_grad', 'written'],
)
def test_dependencies_that_autograd_does_not_tell(join):
    assert _steered_needs(join) == [{('a', 0), ('b', 0)}]


@pytest.mark.parametrize(
    'join',
    [
        lambda a, b: a + torch.zeros_like(b),
        lambda a, b: a + b.new_ones(b.shape),
        lambda a, b: a.view_as(b),
        lambda a, b: a + (b.detach() * 0).shape[1],
    ],
)
def test_sizes_are_no_dependencies(join):
    assert _steered_needs(join) == [{('a', 0)}]


def test_rows_of_tensors_with_one_image(monkeypatch):
    register(monkeypatch)
    detector, _ = tiny_quantized('deformable_detr')
    encoder = next(unit for unit in units_of(detector) if unit.name == 'encoder')
    # the tables of two levels beside queries and positions, and the output
    assert encoder.rows[0].count(2) >= 2 and encoder.rows[0][0] == encoder.rows[0][-1] == 1
