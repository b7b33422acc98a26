import pytest
import torch
import torch.nn.functional as F
from architectures import semi_supervised
from torch import nn

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector
from mmdet_ptq.wrapping import coverage_rows, integer_mac_share, prepare_detector
from mmdet_ptq.wrapping.watching.probe import head_names, part_of, probe_detector


def _layers(probe):
    found = {}
    for call in probe.calls:
        found.setdefault(call.layer, []).append(call)
    return found


def test_macs_by_hand(toy, image):
    layers = _layers(probe_detector(toy, lambda: toy(image)))
    macs = {name: [call.macs for call in calls] for name, calls in layers.items()}
    assert macs == {
        'stem': [8 * 8 * 4 * 3 * 9],
        'depthwise': [8 * 8 * 4 * 9],
        'pointwise': [8 * 8 * 8 * 4],
        'linear': [8 * 6],
        'bbox_head.conv': [8 * 8 * 8 * 8 * 9, 4 * 4 * 8 * 8 * 9],
        'bbox_head.out': [8 * 8 * 5 * 8, 4 * 4 * 5 * 8],
    }


def test_macs_of_a_transposed_convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)

        def forward(self, x):
            return self.up(x)

    net = Net().eval()
    probe = probe_detector(net, lambda: net(torch.randn(1, 4, 5, 5)))
    # every input element is multiplied with the 3 output channels of its group at 4 places
    assert [call.macs for call in probe.calls] == [5 * 5 * 4 * 3 * 4]


def test_first_and_last_layers(toy, image):
    probe = probe_detector(toy, lambda: toy(image))
    assert {call.layer for call in probe.calls if call.reads_image} == {'stem'}
    assert probe.outputs == {'bbox_head.out'}


def test_norms_are_of_outputs_that_nothing_else_reads():
    class Net(nn.Module):
        def __init__(self, run):
            super().__init__()
            self.conv, self.bn, self.run = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), run

        def forward(self, x):
            return self.run(self.bn, self.conv(x))

    def norms(run):
        net = Net(run).eval()
        return probe_detector(net, lambda: net(torch.randn(1, 3, 4, 4))).norms

    assert norms(lambda bn, y: bn(y).relu_()) == [('conv', 'bn')]
    assert norms(lambda bn, y: bn(y.contiguous().float())) == [('conv', 'bn')]
    # no gradient passes the other reader
    assert norms(lambda bn, y: bn(y) * (y > 0)) == norms(lambda bn, y: (bn(y), y.data)) == []
    # before it is normalised, and when it has changed
    assert norms(lambda bn, y: y.detach() + bn(y)) == norms(lambda bn, y: (bn(y), y.mul_(2).argmax())) == []
    assert norms(lambda bn, y: (bn(y), y)) == []


def test_what_is_read_outside_its_own_module_is_borrowed():
    class Net(nn.Sequential):
        def forward(self, x):
            conv, bn, other = self
            return other(bn(conv(x))) * conv.bias.sum() * bn.running_var.sum() + other.weight.shape[0]

    net = Net(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval()
    borrowed = probe_detector(net, lambda: net(torch.randn(1, 3, 4, 4))).borrowed
    held = {name for name, tensor in net.state_dict(keep_vars=True).items() if id(tensor) in borrowed}
    assert held == {'0.bias', '1.running_var'}


def test_nothing_is_left_behind(toy, image):
    toy.stem.weight.requires_grad_(False)
    probe_detector(toy, lambda: toy(image))
    assert not toy.stem.weight.requires_grad
    assert toy.pointwise.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in toy.modules())


def test_hooks_go_when_the_forward_fails(toy):
    with pytest.raises(RuntimeError):
        probe_detector(toy, lambda: toy(torch.randn(1, 7, 8, 8)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in toy.modules())


def test_what_reads_learned_queries_reads_no_image():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.project = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)
            self.queries = nn.Parameter(torch.randn(5, 4))
            self.bbox_head = nn.Linear(4, 2)

        def forward(self, x):
            x.mul_(2)  # detectors may write to the image
            tokens = self.stem(x).flatten(2).transpose(1, 2)
            return self.bbox_head(self.project(input=self.queries) @ tokens.transpose(1, 2) @ tokens)

    net, image = Net().eval(), torch.ones(1, 3, 4, 4)
    probe = probe_detector(net, lambda: net(image))
    assert {call.layer for call in probe.calls if call.reads_image} == {'stem'}
    assert image.requires_grad is False
    # a part of a detector has no image
    probe = probe_detector(net, lambda: net.bbox_head(net.project(net.queries)))
    assert {call.layer for call in probe.calls if call.reads_image} == {'project'}


@pytest.mark.parametrize(
    'kind, first, last',
    [
        ('ssd', {'backbone.conv1.conv'}, {f'bbox_head.{b}_convs.{i}.1' for b in ('cls', 'reg') for i in range(4)}),
        ('retinanet', {'backbone.conv1'}, {'bbox_head.retina_cls', 'bbox_head.retina_reg'}),
        (
            'yolox',
            {'backbone.stem.conv.conv'},
            {f'bbox_head.multi_level_conv_{b}.{i}' for b in ('cls', 'reg', 'obj') for i in range(2)},
        ),
        ('rtmdet', {'backbone.stem.0.conv'}, {f'bbox_head.rtm_{b}.{i}' for b in ('cls', 'reg') for i in range(2)}),
        (
            'faster_rcnn',
            {'backbone.conv1'},
            {'rpn_head.rpn_cls', 'rpn_head.rpn_reg', 'roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg'},
        ),
    ],
)
def test_first_and_last_layers_of_detectors(kind, first, last):
    detector = tiny_detector(kind)
    probe = probe_detector(detector, lambda: predict(detector, tiny_batch(1)))
    assert {call.layer for call in probe.calls if call.reads_image} == first
    assert probe.outputs == last
    assert probe.uncovered == []
    calls = _layers(probe)
    if kind == 'retinanet':
        for name in ('cls_convs.0.conv', 'reg_convs.0.conv', 'retina_cls', 'retina_reg'):
            assert [c.index for c in calls[f'bbox_head.{name}']] == [0, 1, 2]
        cls, reg = (calls[f'bbox_head.{b}_convs.0.conv'] for b in ('cls', 'reg'))
        assert [c.input_key for c in cls] == [c.input_key for c in reg]
        assert len({c.input_key for c in cls}) == 3


def _with(toy, forward, **modules):
    for name, module in modules.items():
        setattr(toy, name, module)
    toy.features = forward
    return toy.eval()


def _prepare(toy, image, **ptq):
    structure = prepare_detector(toy, PTQConfig.from_dict(dict(preset='w8a8_observe', **ptq)), lambda: toy(image))
    return structure, {row.name: row for row in coverage_rows(structure)}


def test_weight_standardised_convolution_is_named(toy, image):
    from mmcv.cnn.bricks import ConvWS2d

    inner = type(toy).features
    _with(toy, lambda x: toy.ws(inner(toy, x)), ws=ConvWS2d(8, 8, 3, padding=1))
    _, rows = _prepare(toy, image)
    assert not rows['ws'].integer
    assert rows['ws'].macs == 8 * 8 * 8 * 8 * 9
    assert rows['ws'].reason == 'its weight is transformed inside the forward pass'


def test_bare_convolution_on_a_parameter_is_named(toy, image):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x):
            return F.conv2d(x, self.kernel)

    inner = type(toy).features
    _with(toy, lambda x: toy.bare(inner(toy, x)), bare=Bare())
    structure, rows = _prepare(toy, image)
    row = rows['bare']
    assert (row.kind, row.part, row.macs, row.integer) == ('conv2d', 'bare', 8 * 8 * 8 * 8, False)
    assert row.reason == 'a parameter of a module that is no layer'
    total = sum(r.macs for r in rows.values())
    assert integer_mac_share(structure) == pytest.approx(1 - row.macs / total)


@pytest.mark.parametrize(
    'product',
    [lambda a, b: torch.matmul(a, b), lambda a, b: a @ b, lambda a, b: a.matmul(b), lambda a, b: torch.bmm(a, b)],
    ids=['torch.matmul', '@', 'Tensor.matmul', 'bmm'],
)
def test_activation_products_are_named(toy, image, product):
    class Attention(nn.Module):
        def forward(self, x):
            y = x.flatten(2)
            return product(product(y, y.transpose(1, 2)), y).view_as(x)

    inner = type(toy).features
    _with(toy, lambda x: toy.attention(inner(toy, x)), attention=Attention())
    structure, _ = _prepare(toy, image, products='float')
    assert [op['module'] for op in structure.uncovered] == ['attention', 'attention']
    assert [op['macs'] for op in structure.uncovered] == [8 * 8 * 64] * 2
    assert {op['reason'] for op in structure.uncovered} == {'activation x activation product'}


def with_attention(toy, **options):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **options)

        def forward(self, x):
            y = x.flatten(2).transpose(1, 2)
            return self.mha(y, y, y)[0].transpose(1, 2).reshape(x.shape)

    inner = type(toy).features
    _with(toy, lambda x: toy.attention(inner(toy, x)), attention=Attention())
    return toy


def test_attention_that_stays_closed_is_counted_once(toy, image):
    structure, _ = _prepare(with_attention(toy, add_zero_attn=True), image)
    assert [op['operation'] for op in structure.uncovered] == ['multi_head_attention_forward']


def test_attention_is_counted_once(toy, image):
    structure, _ = _prepare(with_attention(toy), image, products='float')
    # four projections of 64 positions are layers; two products over all their pairs are not
    layers = {layer.name: layer.macs for layer in structure.layers if layer.name.startswith('attention.')}
    assert layers == {f'attention.mha.{part}_proj': 64 * 8 * 8 for part in ('q', 'k', 'v', 'out')}
    assert [(op['operation'], op['macs']) for op in structure.uncovered] == 2 * [('matmul', 64 * 64 * 8)]


def test_heads_are_found_wherever_a_wrapper_keeps_them():
    assert head_names(tiny_detector('faster_rcnn')) == ['rpn_head', 'roi_head']
    teacher = semi_supervised('faster_rcnn')
    heads = head_names(teacher)
    assert heads == ['student.rpn_head', 'student.roi_head', 'teacher.rpn_head', 'teacher.roi_head']
    # a backbone's own head is none that predicts
    teacher.teacher.backbone.head = nn.Linear(4, 4)
    assert head_names(teacher) == heads
    parts = [
        part_of(name, heads) for name in ('teacher.roi_head.bbox_head.fc_cls', 'teacher.neck.fpn_convs.0', 'other.x')
    ]
    assert parts == ['teacher.roi_head', 'teacher.neck', 'other']
    assert part_of('backbone.layer1.conv', ['bbox_head']) == 'backbone'
