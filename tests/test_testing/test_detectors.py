"""Random detectors whose activations are of order one, and whose normalisations fit them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import EmbeddingRPNHead
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing.data import tiny_batch
from mmdet_ptq.testing.detectors import KINDS, randomise, tiny_detector
from mmdet_ptq.testing.models import NUM_CLASSES


class Small(nn.Module):
    """Two convolutions, a normalisation between them, and the parameters that need values of their own."""

    def __init__(self, **parameters: torch.Tensor) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 2, 1)
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)).relu())


def test_a_seed_gives_the_same_detector_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    first, again, other = (tiny_detector('retinanet', seed).state_dict() for seed in (2, 2, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first['backbone.conv1.weight'], other['backbone.conv1.weight'])


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_is_float_in_eval_mode_and_finds_something(kind):
    detector = tiny_detector(kind)
    assert not any(module.training for module in detector.modules())
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.momentum == 0.1 and norm.num_batches_tracked == 0 for norm in norms)
    with torch.no_grad():
        found = [sample.pred_instances for sample in detector.test_step(tiny_batch(2))]
    assert all(len(instances) > 0 and torch.isfinite(instances.bboxes).all() for instances in found)
    assert all(0 <= instances.labels.min() and instances.labels.max() < NUM_CLASSES for instances in found)
    # the images matter: a detector as mmdet initialises it answers alike to all
    assert not torch.allclose(found[0].scores[:1], found[1].scores[:1])


def test_the_statistics_are_those_of_the_one_pass():
    net, x = Small(), torch.randn(4, 3, 9, 9) * 5 + 2
    randomise(net, lambda: net(x))
    with torch.no_grad():
        seen = net.first(x).numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(6, -1)
    np.testing.assert_allclose(net.norm.running_mean, seen.mean(1), rtol=1e-4, atol=1e-5)
    variances = seen.var(1, ddof=1)
    np.testing.assert_allclose(net.norm.running_var, variances.clip(0.3 * variances.mean()), rtol=1e-4)
    assert not net.norm.training and net.norm.num_batches_tracked == 0 and net.norm.momentum == 0.1


def test_a_channel_that_hardly_varies_does_not_blow_up():
    net, x = Small(), torch.zeros(2, 3, 9, 9)
    x[:, 0] = torch.randn(2, 9, 9)

    def run():
        net.first.weight[0, 0] = 0  # this channel sees what is constant, and its variance is zero
        net(x)

    randomise(net, run)
    assert net.norm.running_var[0] > 0.1 * net.norm.running_var.max()
    with torch.no_grad():
        assert net.norm(net.first(x + 1)).abs().max() < 100


def test_layers_keep_the_scale_of_what_passes():
    net = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())])
    randomise(net, lambda: None)
    with torch.no_grad():
        out = net[:-1](torch.randn(2, 64, 12, 12))
    assert 0.1 < out.std() < 10
    # with PyTorch's own start it dies out
    with torch.no_grad():
        plain = nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) if i % 2 == 0 else nn.ReLU() for i in range(15)])
        assert plain(torch.randn(2, 64, 12, 12)).std() < 0.1


def test_parameters_that_would_switch_something_off_get_a_value():
    zero, one, many = torch.zeros(1), torch.full((1, 1), 3.0), torch.zeros(4)
    net = Small(zero=zero, one=one, many=many)
    randomise(net, lambda: None)
    assert net.zero.tolist() == [0.5] and net.one.tolist() == [[3.0]] and not net.many.any()
    assert net.first.bias is None and net.second.bias.all()


def test_embeddings_of_levels_and_proposals_are_drawn():
    net = Small(level_embed=torch.full((2, 50), torch.nan))
    net.rpn_head = EmbeddingRPNHead(num_proposals=40, proposal_feature_channel=4)
    randomise(net, lambda: None)
    assert 0.5 < net.level_embed.std() < 1.5
    boxes = net.rpn_head.init_proposal_bboxes.weight
    assert boxes.min() >= 0.3 and boxes.max() <= 0.7 and boxes.std() > 0.05


def test_an_unknown_kind_is_told():
    with pytest.raises(PTQError, match="there is no tiny detector 'yolo'. Did you mean 'yolox'"):
        tiny_detector('yolo')
