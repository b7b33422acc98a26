import copy

import pytest
import torch
import torch.nn.functional as F
from mmdet.apis import init_detector
from torch import nn

from mmdet_ptq.cli import load_config
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.preparing.equalization import channel_magnitudes, equalize, log_equalization, rescale
from mmdet_ptq.wrapping.preparing.find_folds import find_folds
from mmdet_ptq.wrapping.preparing.junctions import find_junctions
from mmdet_ptq.wrapping.watching.probe import probe_detector


def _fold(detector, run):
    folds, _ = find_folds(detector, probe_detector(detector, run))
    fold_norms(detector, folds)


def _folded_tiny(kind):
    detector = tiny_detector(kind)
    _fold(detector, lambda: predict(detector, tiny_batch(1)))
    return detector, *find_junctions(detector, lambda: predict(detector, tiny_batch(1)))


@torch.no_grad()
def _outputs(detector, x):
    features = detector.extract_feat(x)
    head = detector.bbox_head if hasattr(detector, 'bbox_head') else detector.rpn_head
    outputs = [t for group in head(features) for t in group]
    if hasattr(detector, 'roi_head'):
        pooled = torch.randn(6, 16, 5, 5, generator=torch.Generator().manual_seed(0)).to(x)
        outputs += detector.roi_head.bbox_head(pooled)
    return outputs


def _largest_change(before, after):
    return max(((a - b).abs().max() / b.abs().max()).item() for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize('by_magnitude', [False, True], ids=['weights', 'magnitudes'])
@pytest.mark.parametrize('kind', ['ssd', 'retinanet', 'faster_rcnn'])
def test_detectors_keep_their_outputs(kind, by_magnitude):
    """In float64: untrained detectors magnify float32 rounding."""
    detector, junctions, _ = _folded_tiny(kind)
    detector.double()
    x = detector.data_preprocessor(tiny_batch(2), False)['inputs'].double()
    before = _outputs(detector, x)
    magnitudes = channel_magnitudes(detector, junctions, lambda: _outputs(detector, x)) if by_magnitude else None
    done = equalize(detector, junctions, magnitudes, iterations=3)
    assert len(done) >= 10
    assert max(entry.factors.max() / entry.factors.min() for entry in done) > 2
    assert _largest_change(before, _outputs(detector, x)) <= 1e-10


def test_a_trained_detector_keeps_its_outputs():
    cfg = load_config('configs/ssdlite_mbv2_ptq.py')
    detector = init_detector(cfg, cfg.load_from, device='cpu')
    image = F.interpolate(torch.rand(2, 3, 20, 20) * 255, (320, 320), mode='bilinear')
    x = detector.data_preprocessor(dict(inputs=list(image), data_samples=None), False)['inputs']
    _fold(detector, lambda: detector.bbox_head(detector.extract_feat(x)))
    junctions, skipped = find_junctions(detector, lambda: detector.bbox_head(detector.extract_feat(x)))
    before = _outputs(detector, x)
    done = equalize(detector, junctions, iterations=5)
    assert len(done) == 30 and len(skipped) == 23
    assert all('upper clip' in entry.reason for entry in skipped)
    assert _largest_change(before, _outputs(detector, x)) <= 1e-4


def test_what_the_detectors_share():
    _, junctions, skipped = _folded_tiny('retinanet')
    assert not skipped
    found = {junction.producers: junction.readers for junction in junctions}
    # a head over all levels: the layers before it share their factors
    assert found[tuple(f'neck.fpn_convs.{i}.conv' for i in range(3))] == (
        'bbox_head.cls_convs.0.conv',
        'bbox_head.reg_convs.0.conv',
    )
    # a residual stage
    assert ('backbone.layer2.0.conv2', 'backbone.layer2.0.downsample.0', 'backbone.layer2.1.conv2') in found


def test_swish_detectors_are_left_alone_and_named(monkeypatch):
    detector, junctions, skipped = _folded_tiny('yolox')
    before = copy.deepcopy(detector.state_dict())
    assert equalize(detector, junctions) == []
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    entry = next(e for e in skipped if e.producer == 'backbone.stem.conv.conv')
    assert entry.reason == '`sigmoid` stands between' and len(entry.readers) == 1
    lines = []
    monkeypatch.setattr(
        'mmdet_ptq.wrapping.preparing.equalization.print_log', lambda text, *_, **__: lines.append(text)
    )
    log_equalization([], skipped)
    (line,) = [line for line in lines if 'because `sigmoid` stands between: ' in line]
    assert f'backbone.stem.conv.conv -> {entry.readers[0]}' in line


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        with torch._C.DisableTorchFunction():  # as unseen as a compiled kernel
            return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class _Net(nn.Module):
    """a -> wiring -> b; further layers for the wirings."""

    def __init__(self, wiring):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(3, 4, 1)
        self.same = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.b = nn.Conv2d(4, 2, 1)
        self.width = nn.Linear(8, 4)
        self.prelu = nn.PReLU(4)
        self.drop = nn.Dropout()
        self.register_buffer('constant', torch.ones(1, 4, 8, 8))
        self.wiring = wiring
        self.double().eval()

    def forward(self, x):
        return self.wiring(self, x).sigmoid()


IMAGE = torch.linspace(-3, 5, 3 * 64).sin().reshape(1, 3, 8, 8).double() * 20


def _junctions(net):
    found, skipped = find_junctions(net, lambda: net(IMAGE))
    return [j for j in found if 'a' in j.producers], {entry.producer: entry.reason for entry in skipped}


def _inplace(net, x):
    y = net.a(x)
    y.relu_()
    return net.b(y)


@pytest.mark.parametrize(
    'wiring, producers, readers',
    [
        (lambda m, x: m.b(m.a(x)), 'a', 'b'),
        (lambda m, x: m.b(m.a(x).relu()), 'a', 'b'),
        (_inplace, 'a', 'b'),
        (lambda m, x: m.b(F.leaky_relu(m.a(x), 0.1)), 'a', 'b'),
        (lambda m, x: m.b(m.prelu(m.a(x))), 'a', 'b'),
        (lambda m, x: m.b(m.drop(F.max_pool2d(m.a(x).relu(), 2))), 'a', 'b'),
        (lambda m, x: m.b(F.interpolate(F.pad(m.a(x), (1, 1)), scale_factor=2)), 'a', 'b'),
        (lambda m, x: m.b((m.a(x) + m.other(x)).relu()), 'a other', 'b'),
        (lambda m, x: m.b(m.a(x)) + m.b(m.other(x).relu()), 'a other', 'b'),
        (lambda m, x: m.b(m.same(m.same(m.a(x)))), 'a same', 'same b'),
        (lambda m, x: m.grouped(m.a(x)), 'a', 'grouped'),
        (lambda m, x: m.depthwise(m.a(x).relu()), 'a', 'depthwise'),
        (lambda m, x: m.up(m.a(x).relu()), 'a', 'up'),
        (lambda m, x: m.b(m.a(x)) + m.grouped(m.a(x)).sum(1, keepdim=True), 'a', 'b grouped'),
    ],
    ids=[
        'identity',
        'relu',
        'in place',
        'leaky relu',
        'prelu',
        'pool',
        'resize',
        'sum',
        'reader called twice',
        'loop',
        'groups',
        'depthwise',
        'transposed',
        'two readers',
    ],
)
def test_what_may_be_equalized(wiring, producers, readers):
    net = _Net(wiring)
    (junction,), _ = _junctions(net)
    assert (junction.producers, junction.readers) == (tuple(producers.split()), tuple(readers.split()))
    before, weight = net(IMAGE), net.a.weight.clone()
    rescale(net, junction, torch.tensor([0.1, 3.0, 1.0, 0.7]).double())
    assert not torch.allclose(net.a.weight, weight)
    torch.testing.assert_close(net(IMAGE), before, rtol=1e-10, atol=1e-10)
    equalize(net, [junction])
    torch.testing.assert_close(net(IMAGE), before, rtol=1e-10, atol=1e-10)


def _aside(net, x):
    y = net.a(x)
    net.seen = y.detach().abs().max()
    return net.b(y)


def _written_into(net, x):
    y = net.a(x).clone()
    y[:, 0] = 1.0
    return net.b(y)


class _Tied(_Net):
    def __init__(self):
        super().__init__(lambda m, x: m.b(m.a(x)) + m.tied(m.other(x)))
        self.tied = nn.Conv2d(4, 2, 1).double()
        self.tied.weight = self.b.weight


@pytest.mark.parametrize(
    'net, reason',
    [
        (_Net(lambda m, x: m.b(F.silu(m.a(x)))), '`silu` stands between'),
        (_Net(lambda m, x: m.b(m.a(x).sigmoid() * m.a(x))), 'stands between'),
        (_Net(lambda m, x: m.b(torch.cat([m.a(x)[:, :2], m.other(x)[:, :2]], 1))), '`__getitem__` stands between'),
        (_Net(lambda m, x: m.b(m.a(x) + 1)), '`add` stands between'),
        (_Net(lambda m, x: m.b(m.a(x) + torch.ones(1, 4, 8, 8).double())), '`ones` stands between'),
        (_Net(lambda m, x: m.b(m.a(x) + m.constant)), 'comes from no layer'),
        (_Net(lambda m, x: m.b(m.a(x) + m.other(x).mean(1, keepdim=True))), 'stands between'),
        (_Net(lambda m, x: m.b(m.a(x)) + m.b(x.repeat(1, 2, 1, 1)[:, :4])), 'stands between'),
        (_Net(_aside), '`detach` stands between'),
        (_Net(_written_into), '`__setitem__` stands between'),
        (_Net(lambda m, x: m.b(_Twice.apply(m.a(x)))), '`_Twice` stands between'),
        (_Net(lambda m, x: m.b(m.a(x)) + _Twice.apply(m.a(x))[:, :2]), '`_Twice` stands between'),
        (_Net(lambda m, x: m.same(F.conv2d(m.a(x), torch.ones(4, 4, 1, 1).double()))), '`conv2d` stands between'),
        (_Net(lambda m, x: m.b(m.a(x)) + m.b.weight.sum()), 'reads its weight'),
        (_Net(lambda m, x: m.b(m.a(x)) * m.a.weight.sum()), 'reads its weight'),
        (_Net(lambda m, x: m.width(m.a(x))), 'which axis holds the channels'),
        (_Net(lambda m, x: m.b(m.a(x).clamp(0.1, 1e9))), '`clamp` stands between'),
        (_Net(lambda m, x: m.b(F.pad(m.a(x), (1, 1), value=2.0))), '`pad` stands between'),
        (_Net(lambda m, x: m.b(F.relu6(m.a(x)))), 'its upper clip may act in every channel'),
        (_Net(lambda m, x: m.b(F.dropout(m.a(x), training=True))), '`dropout` stands between'),
        (_Tied(), 'its weight is that of'),
        (_Net(lambda m, x: m.b(torch.add(m.a(x), other=1.0))), '`add` stands between'),
        (_Net(lambda m, x: m.b(m.a(x).to(torch.int64).to(x.dtype))), '`to` stands between'),
        (
            _Net(lambda m, x: m.b(F.relu6(m.same(torch.add(F.relu6(m.other(x)), F.relu6(m.a(x)), alpha=-3.0))))),
            '`add` stands between',
        ),
    ],
    ids=[
        'silu',
        'swish',
        'part',
        'constant',
        'new tensor',
        'buffer',
        'broadcast',
        'reader of something else',
        'read aside',
        'written into',
        'custom function',
        'custom function aside',
        'functional',
        'reader weight read',
        'producer weight read',
        'axis',
        'lower clip',
        'padding',
        'relu6 of the image',
        'dropout',
        'tied weights',
        'constant by keyword',
        'rounded to integers',
        'factor of a sum',
    ],
)
def test_what_may_not_be_equalized(net, reason):
    found, skipped = _junctions(net)
    assert found == []
    assert reason in skipped['a']


def test_what_the_detector_returns_is_read():
    net = _Net(None)
    net.forward = lambda x: (lambda y: (y, net.b(y)))(net.a(x))
    found, skipped = _junctions(net)
    assert found == [] and skipped['a'] == 'the detector returns it'


def test_relu6_only_where_the_clip_provably_never_acts():
    net = _Net(lambda m, x: m.b(F.relu6(m.same(F.relu6(m.a(x))))))
    with torch.no_grad():
        net.same.weight.copy_(
            torch.tensor([[0.5, 0.25, 0, -9], [0.5, 0.6, 0, 0], [-1, -1, -1, -1], [0.1, 0, 0, 0]])[..., None, None]
        )
        net.same.bias.copy_(torch.tensor([1.0, 0.0, -1.0, 0.0]))
    found, skipped = find_junctions(net, lambda: net(IMAGE))
    junction = next(j for j in found if j.producers == ('same',))
    # 6 * 0.75 + 1 = 5.5; 6 * 1.1 = 6.6; never positive; 0.6
    assert junction.fixed.tolist() == [False, True, False, False]
    torch.testing.assert_close(junction.floor[[0, 3]], torch.tensor([5.5 / 6, 0.1]).double(), rtol=1e-5, atol=0)
    assert [entry.producer for entry in skipped] == ['a']
    before = [net(IMAGE * scale) for scale in (1, 1e3, -1e3)]
    (done,) = equalize(net, [junction])
    assert done.factors[1] == 1 and done.factors[3] < 1
    after = [net(IMAGE * scale) for scale in (1, 1e3, -1e3)]
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    # one step below its floor the clip acts: the bound is not merely cautious
    rescale(net, junction, torch.tensor([5.5 / 6 / done.factors[0].item() * 0.9, 1, 1, 1]).double())
    assert max((net(IMAGE * s) - b).abs().max().item() for s, b in zip((1, 1e3, -1e3), before, strict=True)) > 1e-4


@pytest.mark.parametrize('clip', [dict(min=0), dict(max=1)], ids=['from below', 'from above'])
def test_a_clip_on_one_side_bounds_nothing(clip):
    net = _Net(lambda m, x: m.b(F.relu6(m.same(m.a(x).clamp(**clip)))))
    with torch.no_grad():
        net.same.weight[:, 0] = 0  # infinity times this would be no number
    found, skipped = find_junctions(net, lambda: net(IMAGE))
    assert {s.producer: s.reason for s in skipped}['same'] == 'its upper clip may act in every channel'
    before = net(IMAGE)
    equalize(net, found)
    torch.testing.assert_close(net(IMAGE), before, rtol=1e-10, atol=1e-10)


def test_clips_of_tokens_have_one_bound_for_all_channels():
    net = _Net(lambda m, x: m.narrow(F.relu6(F.relu6(m.width(x)))))
    net.narrow = nn.Linear(4, 2).double()
    found, skipped = find_junctions(net, lambda: net(IMAGE))
    assert found == [] and skipped[0].producer == 'width'


def test_a_frozen_parameter_of_integers_stays_one():
    net = _Net(lambda m, x: m.b(m.a(x).relu()))
    net.table = nn.Parameter(torch.arange(3), requires_grad=False)
    for watch in (find_junctions, probe_detector):
        watch(net, lambda: net(IMAGE))
        assert not net.table.requires_grad


def test_a_depthwise_chain_reaches_the_three_layer_solution():
    chain = (
        nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Sigmoid()
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        chain[0].weight *= torch.tensor([1e-1, 1, 10, 3]).reshape(-1, 1, 1, 1)

    def ranges():
        return torch.stack(
            [
                chain[0].weight.abs().amax((1, 2, 3)),
                chain[2].weight.abs().amax((1, 2, 3)),
                chain[4].weight.abs().amax((0, 2, 3)),
            ]
        ).detach()

    def shares():
        return ranges() / ranges().amax(1, keepdim=True)

    product = ranges().prod(0)
    spread = (shares().amax(0) / shares().amin(0)).max()
    found, _ = find_junctions(chain, lambda: chain(IMAGE))
    equalize(chain, found)
    torch.testing.assert_close(ranges().prod(0), product)
    # AIMET and Nagel et al.: every layer gets the cube root of the product, up to one factor per layer
    wanted = product ** (1 / 3)
    torch.testing.assert_close(shares(), (wanted / wanted.max()).expand(3, -1), rtol=2e-2, atol=0)
    assert spread > 5


def test_dead_channels_keep_their_factor():
    net = _Net(lambda m, x: m.b(m.a(x).relu()))
    with torch.no_grad():
        net.a.weight[1] = 0
        net.b.weight[:, 2] = 0
    (junction,), _ = _junctions(net)
    (done,) = equalize(net, [junction])
    assert done.factors[1] == done.factors[2] == 1
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_all_of_the_range_migrates_into_a_depthwise_reader():
    net = _Net(lambda m, x: m.depthwise(m.a(x).relu()))
    with torch.no_grad():
        net.a.weight *= torch.tensor([0.2, 1, 5, 3]).reshape(-1, 1, 1, 1)
    (junction,), _ = _junctions(net)
    (held,) = channel_magnitudes(net, [junction], lambda: net(IMAGE))
    torch.testing.assert_close(held, net.a(IMAGE).relu().amax((0, 2, 3)).detach())
    before = net(IMAGE)
    (done,) = equalize(net, [junction], [held])
    torch.testing.assert_close(done.factors, held / held.max())
    (after,) = channel_magnitudes(net, [junction], lambda: net(IMAGE))
    torch.testing.assert_close(after, held.max().expand(4))
    torch.testing.assert_close(net(IMAGE), before, rtol=1e-10, atol=1e-10)


def test_half_of_the_range_migrates_into_a_dense_reader():
    net = _Net(lambda m, x: m.b(m.a(x).relu()))
    with torch.no_grad():
        net.b.weight.copy_(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1]])[..., None, None])
    (junction,), _ = _junctions(net)
    held = torch.tensor([4.0, 1.0, 0.25, 0.0625]).double()
    (done,) = equalize(net, [junction], [held], iterations=1)
    torch.testing.assert_close(done.factors, torch.tensor([1, 0.5, 0.25, 0.125]).double())


def test_nothing_is_left_behind():
    net = _Net(lambda m, x: m.b(m.a(x)))
    net.a.weight.requires_grad_(False)
    found, _ = _junctions(net)
    channel_magnitudes(net, found, lambda: net(IMAGE))
    assert not net.a.weight.requires_grad and net.b.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
