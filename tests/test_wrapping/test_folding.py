import copy

import pytest
import torch
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import KINDS, predict, tiny_batch, tiny_detector
from mmdet_ptq.wrapping.folding import find_folds, fold_norms
from mmdet_ptq.wrapping.probe import probe_detector


def _dense_outputs(detector, dtype):
    x = detector.data_preprocessor(tiny_batch(2), False)['inputs'].to(dtype)
    features = detector.extract_feat(x)
    head = detector.bbox_head if hasattr(detector, 'bbox_head') else detector.rpn_head
    return [*features, *(t for group in head(features) for t in group)]


@pytest.mark.parametrize('kind', KINDS)
def test_outputs_stay_the_same(kind):
    detector = tiny_detector(kind)
    probe = probe_detector(detector, lambda: predict(detector, tiny_batch(1)))
    folds, kept = find_folds(detector, probe.norms)
    norms = {n for n, m in detector.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {norm for _, norm in folds} | set(kept) == norms
    assert len(folds) > len(norms) // 2
    outputs = {}
    for dtype in (torch.float64, torch.float32):
        folded = copy.deepcopy(detector).to(dtype)
        with torch.no_grad():
            before = _dense_outputs(folded, dtype)
            fold_norms(folded, folds)
            outputs[dtype] = list(zip(before, _dense_outputs(folded, dtype), strict=True))
        assert {n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)} == set(kept)
    for (truth, folded64), (before, after) in zip(*outputs.values(), strict=True):
        scale = truth.abs().max()
        assert (folded64 - truth).abs().max() <= 1e-10 * scale
        # untrained detectors magnify float32 rounding; folding may not add to what the float detector has itself
        rounding = (before - truth).abs().max()
        assert (after - truth).abs().max() <= max(1e-5 * scale, 16 * rounding)
    if kind == 'rtmdet':
        assert len(kept) == 12
        for name, reason in kept.items():
            assert name.startswith('bbox_head.')
            assert 'shared by several normalisations' in reason and 'bbox_head.' in reason
    else:
        assert not kept


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


@pytest.mark.parametrize('wiring', [
    lambda m, x: m.bn(m.conv(x)) + m.conv(x),
    lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)),
    lambda m, x: m.conv(m.bn(m.conv(x))),
    lambda m, x: m.bn(m.conv(x).relu()),
    lambda m, x: m.bn(x) + m.conv(x),
], ids=['second call unnormalised', 'output read twice', 'chained', 'something between', 'no convolution before'])
def test_what_may_not_be_folded(wiring):
    net = _Net(wiring).eval()
    probe = probe_detector(net, lambda: net(torch.randn(1, 3, 8, 8)))
    folds, kept = find_folds(net, probe.norms)
    assert folds == []
    assert 'no single convolution feeds it' in kept['bn']


def test_a_pair_called_twice_is_folded():
    net = _Net(lambda m, x: m.bn(m.conv(m.bn(m.conv(x))))).eval()
    probe = probe_detector(net, lambda: net(torch.randn(1, 3, 8, 8)))
    assert find_folds(net, probe.norms) == ([('conv', 'bn')], {})


def test_a_norm_without_statistics_stays():
    net = _Net(lambda m, x: m.bn(m.conv(x)))
    net.bn = nn.BatchNorm2d(3, track_running_stats=False)
    probe = probe_detector(net.eval(), lambda: net(torch.randn(1, 3, 8, 8)))
    assert find_folds(net, probe.norms) == ([], {'bn': 'it has no running statistics'})


def test_a_pair_the_detector_lacks_is_refused():
    with pytest.raises(PTQError, match='has no layer conv followed by other'):
        fold_norms(_Net(None), [('conv', 'other')])
