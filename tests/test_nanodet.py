"""The example of a detector that mmdet does not ship: it loads what its project publishes, and goes to ncnn."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_ptq import PTQError
from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import get_runtime, open_model
from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.testing import predict, raw_outputs, tiny_batch
from mmdet_ptq.testing.detectors import randomise
from mmdet_ptq.wrapping import prepare_detector

CONFIGS = Path(__file__).resolve().parent.parent / 'configs' / 'nanodet'
# some names and shapes of the published files, as they stand there
PUBLISHED = {
    'm': {
        'backbone.conv1.0.weight': (24, 3, 3, 3),
        'backbone.stage2.0.branch1.0.weight': (24, 1, 3, 3),
        'backbone.stage3.7.branch2.6.running_var': (116,),
        'backbone.stage4.3.branch2.5.weight': (232, 232, 1, 1),
        'fpn.lateral_convs.2.conv.bias': (96,),
        'head.cls_convs.2.1.depthwise.weight': (96, 1, 3, 3),
        'head.cls_convs.0.0.pwnorm.bias': (96,),
        'head.gfl_cls.1.weight': (112, 96, 1, 1),
    },
    'plus_m': {
        'backbone.stage2.0.branch2.3.weight': (58, 1, 3, 3),
        'fpn.reduce_layers.1.conv.weight': (96, 232, 1, 1),
        'fpn.reduce_layers.0.bn.running_mean': (96,),
        'fpn.top_down_blocks.1.blocks.0.ghost1.primary_conv.0.weight': (48, 192, 1, 1),
        'fpn.bottom_up_blocks.0.blocks.0.ghost2.cheap_operation.0.weight': (48, 1, 3, 3),
        'fpn.top_down_blocks.0.blocks.0.shortcut.0.weight': (192, 1, 5, 5),
        'fpn.top_down_blocks.0.blocks.0.shortcut.3.weight': (96,),
        'fpn.downsamples.1.dwnorm.weight': (96,),
        'fpn.extra_lvl_in_conv.0.depthwise.weight': (96, 1, 5, 5),
        'fpn.extra_lvl_out_conv.0.pointwise.weight': (96, 96, 1, 1),
        'head.cls_convs.3.1.depthwise.weight': (96, 1, 5, 5),
        'head.gfl_cls.3.bias': (112,),
    },
}
# millions, as the project's table has them; whether with normalisations it does not say
PARAMETERS = {'m': 0.95, 'plus_m': 1.17}


def detector(kind: str, seed: int = 0) -> nn.Module:
    init_default_scope('mmdet')
    cfg = Config.fromfile(CONFIGS / f'nanodet_{kind}_float.py')
    torch.manual_seed(seed)
    return MODELS.build(cfg.model).eval()


def as_published(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a detector as the project's trainer writes them, with what belongs to training."""
    state = {'head.distribution_project.project': torch.linspace(0, 7, 8)}
    for key, value in model.state_dict().items():
        part, _, rest = key.partition('.')
        if part in ('backbone', 'neck', 'bbox_head') and 'integral' not in key:
            state[f'{dict(neck="fpn", bbox_head="head").get(part, part)}.{rest}'] = value
    state |= {'head.gfl_reg.0.weight': torch.ones(32, 96, 1, 1), 'aux_head.gfl_cls.weight': torch.ones(112, 192, 1, 1)}
    return {f'{prefix}{key}': value for key, value in state.items()}


@pytest.mark.parametrize('kind', PUBLISHED)
def test_the_architecture_is_the_published_one(kind):
    model = detector(kind)
    state = as_published(model, '')
    assert {key: tuple(state[key].shape) for key in PUBLISHED[kind]} == PUBLISHED[kind]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    count = sum(parameter.numel() for module in convolutions for parameter in module.parameters())
    assert count / 1e6 == pytest.approx(PARAMETERS[kind], rel=0.02)


@pytest.mark.parametrize(
    'prefix',
    ['', 'avg_model.', *(pytest.param(prefix, marks=pytest.mark.thorough) for prefix in ('model.', 'module.'))],
)
@pytest.mark.parametrize('kind', PUBLISHED)
def test_a_published_checkpoint_loads_as_it_is(kind, prefix, tmp_path):
    there, here = detector(kind, 1), detector(kind, 2)
    state = as_published(there, prefix)
    if prefix == 'avg_model.':  # the averaged weights are meant, not those beside them
        state |= as_published(here, 'model.')
    torch.save(dict(state_dict=state, epoch=1), tmp_path / 'published.pth')
    load_float_checkpoint(here, str(tmp_path / 'published.pth'))
    assert all(torch.equal(a, b) for a, b in zip(raw_outputs(here), raw_outputs(there), strict=True))
    # and its own, as mmdet's trainer writes them
    torch.save(dict(state_dict=there.state_dict()), tmp_path / 'own.pth')
    here = detector(kind, 3)
    load_float_checkpoint(here, str(tmp_path / 'own.pth'))
    assert all(torch.equal(a, b) for a, b in zip(raw_outputs(here), raw_outputs(there), strict=True))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    state = as_published(detector('m'), 'model.')
    del state['model.fpn.lateral_convs.2.conv.bias']
    torch.save(dict(state_dict=state), tmp_path / 'published.pth')
    with pytest.raises(PTQError, match='neck.lateral_convs.2.conv.bias is missing'):
        load_float_checkpoint(detector('m'), str(tmp_path / 'published.pth'))


@pytest.mark.thorough
@pytest.mark.parametrize('kind', PUBLISHED)
def test_it_runs_in_ncnn(kind, tmp_path):
    pytest.importorskip('ncnn')
    model = detector(kind)
    batch = tiny_batch(1)
    randomise(model, lambda: raw_outputs(model, tiny_batch(4)))
    block = PTQConfig.from_dict(
        dict(
            preset='w8a8_observe',
            export=['ncnn'],
            weights=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')),
            activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')),
        )
    )
    structure = prepare_detector(model, block, lambda: predict(model, batch))
    observe_activations(model, [batch], structure)
    runtime = get_runtime('ncnn')
    path = runtime.export(copy.deepcopy(model), tmp_path, (1, 3, 64, 64))
    assert sum(file.stat().st_size for file in path.parent.glob('*.ncnn.*')) < 1.5e6
    image = model.data_preprocessor(copy.deepcopy(batch), False)['inputs']
    found, expected = open_model(path)(image.numpy()), raw_outputs(model, batch)
    for a, b in zip(found, expected, strict=True):
        b = b.detach()
        assert ((torch.as_tensor(a) - b).square().mean() / b.square().mean()).sqrt() < 0.2
