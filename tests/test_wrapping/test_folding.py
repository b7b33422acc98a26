import copy

import pytest
import torch
from mmcv.cnn import ConvAWS2d, ConvWS2d
from mmcv.cnn.bricks import Conv2dAdaptivePadding, wrappers
from mmdet.apis import init_detector
from mmengine.model.utils import _BatchNormXd
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm

from mmdet_ptq.cli import load_config
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import KINDS, predict, tiny_batch, tiny_detector
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.preparing.find_folds import find_folds
from mmdet_ptq.wrapping.watching.probe import probe_detector


def _dense_outputs(detector, x):
    features = detector.extract_feat(x)
    head = detector.bbox_head if hasattr(detector, 'bbox_head') else detector.rpn_head
    return [*features, *(t for group in head(features) for t in group)]


@torch.no_grad()
def _before_and_after(detector, folds, x):
    """Outputs of a copy of the detector, in the precision of ``x``, without and with its norms folded."""
    folded = copy.deepcopy(detector).to(x.dtype)
    before = _dense_outputs(folded, x)
    fold_norms(folded, folds)
    return folded, before, _dense_outputs(folded, x)


def _largest_change(before, after):
    """The largest difference of any output, as a share of that output's largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for b, a in zip(before, after, strict=True))


def _norm_names(detector):
    return {name for name, module in detector.named_modules() if isinstance(module, nn.BatchNorm2d)}


@pytest.mark.parametrize('kind', KINDS)
def test_folding_is_exact(kind):
    """In float64: untrained detectors magnify float32 rounding a hundredfold, folded or not."""
    detector = tiny_detector(kind)
    probe = probe_detector(detector, lambda: predict(detector, tiny_batch(1)))
    folds, kept = find_folds(detector, probe)
    norms = _norm_names(detector)
    assert {norm for _, norm in folds} | set(kept) == norms
    assert len(folds) > len(norms) // 2
    x = detector.data_preprocessor(tiny_batch(2), False)['inputs'].double()
    folded, before, after = _before_and_after(detector, folds, x)
    assert _largest_change(before, after) <= 1e-10
    assert _norm_names(folded) == set(kept)
    if kind == 'rtmdet':
        assert len(kept) == 4
        for name, reason in kept.items():
            assert name.startswith('bbox_head.')
            assert 'shared by several normalisations' in reason and 'bbox_head.' in reason
    else:
        assert not kept


def _trained(config):
    cfg = load_config(config)
    detector = init_detector(cfg, cfg.load_from, device='cpu')
    # smooth random images, as the detector's own preprocessing passes them on
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 20, 20) * 255, (320, 320), mode='bilinear')
    sample = dict(inputs=[image[0], image[1]], data_samples=None)
    x = detector.data_preprocessor(sample, False)['inputs']
    with torch.no_grad():
        probe = probe_detector(detector, lambda: _dense_outputs(detector, x))
    folds, kept = find_folds(detector, probe)
    assert folds and not kept
    return detector, folds, x


@pytest.mark.slow
def test_a_trained_detector_keeps_its_float_outputs():
    torch.manual_seed(0)
    _, before, after = _before_and_after(*_trained('configs/ssdlite_mbv2_ptq.py'))
    assert _largest_change(before, after) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ssdlite_mbv2_person', 'retinanet_r18_bccd', 'yolox_nano_coco'])
def test_detectors_of_the_zoo_keep_their_float_outputs(zoo, monkeypatch, name):
    monkeypatch.syspath_prepend(str(zoo))
    torch.manual_seed(0)
    detector, folds, x = _trained(str(zoo / 'configs' / f'{name}.py'))
    _, before, after = _before_and_after(detector, folds, x)
    bound = 1e-5
    if name == 'yolox_nano_coco':
        # float32 itself is not that good here: 1.3e-5 away from the same detector in float64
        _, truth, _ = _before_and_after(detector, folds, x.double())
        bound = 2 * _largest_change(truth, before)
        assert bound <= 5e-5
    assert _largest_change(before, after) <= bound


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('layer', [nn.Conv2d, nn.ConvTranspose2d])
def test_one_pair(layer, affine, bias, groups):
    pair = nn.Sequential(layer(4, 6, 3, groups=groups, bias=bias), nn.BatchNorm2d(6, affine=affine)).double()
    nn.init.normal_(pair[1].running_mean)
    nn.init.uniform_(pair[1].running_var, 0.5, 2)
    if affine:
        nn.init.normal_(pair[1].weight)
        nn.init.normal_(pair[1].bias)
    pair.eval()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    before = pair(x)
    fold_norms(pair, [('0', '1')])
    assert isinstance(pair[1], nn.Identity)
    torch.testing.assert_close(pair(x), before, rtol=1e-10, atol=1e-10)


class _Net(nn.Module):
    def __init__(self, wiring):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.bbox_head = nn.Sequential(nn.Conv2d(3, 2, 1))
        self.wiring = wiring

    def forward(self, x):
        return self.bbox_head(self.wiring(self, x))


@pytest.mark.parametrize(
    'wiring',
    [
        lambda m, x: m.bn(m.conv(x)) + m.conv(x),
        lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)),
        lambda m, x: m.conv(m.bn(m.conv(x))),
        lambda m, x: m.bn(m.conv(x).relu()),
        lambda m, x: m.bn(x) + m.conv(x),
    ],
    ids=['second call unnormalised', 'output read twice', 'chained', 'something between', 'no convolution before'],
)
def test_what_may_not_be_folded(wiring):
    net = _Net(wiring).eval()
    probe = probe_detector(net, lambda: net(torch.randn(1, 3, 8, 8)))
    folds, kept = find_folds(net, probe)
    assert folds == []
    assert 'no single convolution feeds it' in kept['bn']


def _norm(channels):
    norm = nn.BatchNorm2d(channels)
    for value in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.2, 4)
    return norm


class _Tied(nn.Sequential):
    """Two convolutions with one weight, each with a normalisation of its own."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), _norm(3), nn.Conv2d(3, 3, 1), _norm(3))
        self[2].weight = self[0].weight


class _Borrowed(nn.Sequential):
    """A weight that the parent reads, too."""

    def forward(self, x):
        return super().forward(x) + nn.functional.conv2d(x, self[0].weight)


class _NormTwice(nn.Sequential):
    """A normalisation that also runs where no convolution is."""

    def forward(self, x):
        return self[1](super().forward(x).relu())


class _OtherSkips(nn.Sequential):
    """A normalisation of two convolutions; something else reads the second one's output."""

    def forward(self, x):
        y = self[2](x)
        return self[1](self[0](x)) + self[1](y) + y


class _Tokens(nn.Sequential):
    """A normalisation over tokens, not over the layer's output channels."""

    def forward(self, x):
        return super().forward(x.flatten(2))


class _NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x):
        return super().forward(x).relu_()


class _ScaledConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).mul_(0.3) + 0.1


class _BiaslessConv(nn.Conv2d):
    """Would ignore the bias that it got from folding."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, None)


def _activated(channels, kind=nn.BatchNorm2d):
    norm = _norm(channels)
    other = kind(channels)
    other.load_state_dict(norm.state_dict())
    return other


def _hooked(module):
    module.register_forward_hook(lambda _, args, output: 2 * output)
    return module


def _patched(module):
    forward = type(module).forward
    module.forward = lambda x: 2 * forward(module, x)
    return module


def _pruned(module):
    return prune.l1_unstructured(module, 'weight', 2)


OWN = 'has a forward or hooks of its own'


@pytest.mark.parametrize(
    ('net', 'reason'),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1), _activated(3, _NormAct)), f'1 (_NormAct) {OWN}'),
        (nn.Sequential(_ScaledConv(3, 3, 1), _norm(3)), f'0 (_ScaledConv) {OWN}'),
        (nn.Sequential(_BiaslessConv(3, 3, 1, bias=False), _norm(3)), f'0 (_BiaslessConv) {OWN}'),
        (nn.Sequential(_hooked(nn.Conv2d(3, 3, 1)), _norm(3)), f'0 (Conv2d) {OWN}'),
        (nn.Sequential(nn.Conv2d(3, 3, 1), _patched(_norm(3))), f'1 (BatchNorm2d) {OWN}'),
        (nn.Sequential(_pruned(nn.Conv2d(3, 3, 1)), _norm(3)), 'transforms its weight'),
        (nn.Sequential(old_weight_norm(nn.Conv2d(3, 3, 1)), _norm(3)), 'transforms its weight'),
        (nn.Sequential(old_spectral_norm(nn.Conv2d(3, 3, 1)), _norm(3)), 'transforms its weight'),
        (nn.Sequential(ConvAWS2d(3, 3, 1), _norm(3)), 'transforms its weight'),
        (nn.Sequential(ConvWS2d(3, 3, 1), _norm(3)), 'transforms its weight'),
        (nn.Sequential(spectral_norm(nn.Conv2d(3, 3, 1)), _norm(3)), 'transforms its weight'),
        (_Tied(), 'something else reads the weight'),
        (_Borrowed(nn.Conv2d(3, 3, 1), _norm(3)), 'something else reads the weight'),
        (_NormTwice(nn.Conv2d(3, 3, 1), _norm(3)), 'no single convolution'),
        (_OtherSkips(nn.Conv2d(3, 3, 1), _norm(3), nn.Conv2d(3, 3, 1)), 'no single convolution'),
        (_Tokens(nn.Linear(64, 64), nn.BatchNorm1d(3)), 'no single convolution'),
    ],
    ids=[
        'activated',
        'scaled',
        'no bias',
        'hooked',
        'patched',
        'pruned',
        'old weight norm',
        'old spectral norm',
        'standardised',
        'standardised, too',
        'spectral',
        'tied',
        'borrowed',
        'norm twice',
        'other skips',
        'tokens',
    ],
)
def test_what_folding_would_change_stays(net, reason):
    net.eval()
    x = torch.randn(1, 3, 8, 8)
    before = net(x)
    folds, kept = find_folds(net, probe_detector(net, lambda: net(x)))
    assert folds == []
    assert kept and all(reason in told for told in kept.values())
    fold_norms(net, folds)
    torch.testing.assert_close(net(x), before)


@pytest.mark.parametrize('layer', [wrappers.Conv2d, wrappers.ConvTranspose2d, Conv2dAdaptivePadding, nn.Conv2d])
def test_forwards_that_are_those_of_torch_are_folded(layer):
    net = nn.Sequential(layer(3, 3, 3), _BatchNormXd(3)).eval()
    folds, kept = find_folds(net, probe_detector(net, lambda: net(torch.randn(1, 3, 8, 8))))
    assert (folds, kept) == ([('0', '1')], {})


def test_a_pair_called_twice_is_folded():
    net = _Net(lambda m, x: m.bn(m.conv(m.bn(m.conv(x))))).eval()
    probe = probe_detector(net, lambda: net(torch.randn(1, 3, 8, 8)))
    assert find_folds(net, probe) == ([('conv', 'bn')], {})


def test_a_norm_without_statistics_stays():
    net = _Net(lambda m, x: m.bn(m.conv(x)))
    net.bn = nn.BatchNorm2d(3, track_running_stats=False)
    probe = probe_detector(net.eval(), lambda: net(torch.randn(1, 3, 8, 8)))
    assert find_folds(net, probe) == ([], {'bn': 'it has no running statistics'})


def test_a_pair_the_detector_lacks_is_refused():
    with pytest.raises(PTQError, match='has no layer conv followed by other'):
        fold_norms(_Net(None), [('conv', 'other')])
