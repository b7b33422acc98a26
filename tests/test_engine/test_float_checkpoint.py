"""Float checkpoints are loaded as mmengine loads them, and nothing is left out in silence."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models import FCOSHead
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_ptq import PTQError
from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.testing import tiny_model_cfg


@MODELS.register_module()
class AuxiliaryHead(FCOSHead):
    """A user's head, with a layer whose name early versions of mmdet gave to another."""

    def _init_predictor(self) -> None:
        super()._init_predictor()
        self.aux_cls = nn.Conv2d(self.feat_channels, self.cls_out_channels, 3, padding=1)


def fcos(head: str, seed: int) -> nn.Module:
    init_default_scope('mmdet')
    cfg = copy.deepcopy(tiny_model_cfg('retinanet'))
    cfg.update(
        type='FCOS',
        train_cfg=None,
        bbox_head=dict(
            type=head,
            num_classes=3,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            norm_cfg=dict(type='BN'),
            strides=(8, 16, 32),
        ),
    )
    torch.manual_seed(seed)
    return MODELS.build(cfg)


def test_layers_with_names_of_early_versions_get_their_weights(tmp_path):
    trained, detector = fcos('AuxiliaryHead', 1), fcos('AuxiliaryHead', 2)
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / 'float.pth')
    load_float_checkpoint(detector, str(tmp_path / 'float.pth'))
    state = trained.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_early_checkpoints_are_renamed_as_mmdet_does(tmp_path, prefix):
    trained, detector = fcos('FCOSHead', 1), fcos('FCOSHead', 2)
    early = {
        prefix + key.replace('conv_cls', 'fcos_cls').replace('conv_reg', 'fcos_reg'): value
        for key, value in trained.state_dict().items()
    }
    torch.save(dict(state_dict=early), tmp_path / 'early.pth')
    load_float_checkpoint(detector, str(tmp_path / 'early.pth'))
    assert torch.equal(detector.bbox_head.conv_cls.weight, trained.bbox_head.conv_cls.weight)
    del early[f'{prefix}bbox_head.fcos_cls.bias']
    torch.save(dict(state_dict=early), tmp_path / 'early.pth')
    with pytest.raises(PTQError, match='1 of [0-9]+ tensors do not match .first: bbox_head.conv_cls.bias is missing'):
        load_float_checkpoint(fcos('FCOSHead', 2), str(tmp_path / 'early.pth'))


def test_a_renamed_tensor_of_another_shape_is_told(tmp_path):
    early = {
        key.replace('conv_cls', 'fcos_cls').replace('conv_reg', 'fcos_reg'): value
        for key, value in fcos('FCOSHead', 1).state_dict().items()
    }
    early['bbox_head.fcos_cls.bias'] = torch.zeros(7)
    torch.save(dict(state_dict=early), tmp_path / 'early.pth')
    with pytest.raises(PTQError, match='does not fit the model.*bbox_head.conv_cls.bias.*7'):
        load_float_checkpoint(fcos('FCOSHead', 2), str(tmp_path / 'early.pth'))


def damaged(change):
    """A float checkpoint's weights, one of them changed."""
    state = fcos('FCOSHead', 1).state_dict()
    change(state)
    return state


KEY = 'bbox_head.conv_cls.weight'
STRANGE = {
    'integer': (lambda state: state.update({KEY: state[KEY].to(torch.int32)}), 'holds int32 where'),
    'bool': (lambda state: state.update({KEY: state[KEY] > 0}), 'holds bool where'),
    'complex': (lambda state: state.update({KEY: state[KEY].to(torch.complex64)}), 'is complex'),
    'sparse': (lambda state: state.update({KEY: state[KEY].to_sparse()}), 'is sparse'),
    'meta': (lambda state: state.update({KEY: state[KEY].to('meta')}), 'is on the meta device'),
    'not a number': (lambda state: state[KEY].fill_(float('nan')), 'holds NaN or infinity'),
    'infinite': (lambda state: state[KEY].fill_(float('inf')), 'holds NaN or infinity'),
    'a negative variance': (lambda state: state['backbone.bn1.running_var'].fill_(-1), 'a variance below zero'),
    'endless': (lambda state: state.update({KEY: torch.zeros(1).expand(2**40)}), 'claims more numbers'),
    'two of a name': (
        lambda state: state.update({f'module.{KEY}': state[KEY] + 1}),
        f'has the weight module.{KEY} and',
    ),
    'a number for a name': (lambda state: state.update({7: torch.ones(1)}), 'has the key 7, a int, where names'),
    'a pair for a name': (lambda state: state.update({('a', 1): torch.ones(1)}), r"has the key \('a', 1\), a tuple"),
}


@pytest.mark.parametrize(('change', 'told'), STRANGE.values(), ids=STRANGE)
def test_what_cannot_be_weights_is_told_in_a_sentence(change, told, tmp_path):
    torch.save(dict(state_dict=damaged(change)), tmp_path / 'float.pth')
    with pytest.raises(PTQError, match=told) as error:
        load_float_checkpoint(fcos('FCOSHead', 2), str(tmp_path / 'float.pth'))
    assert '\n' not in str(error.value)


def test_numbers_of_8_bits_are_read(tmp_path):
    state = {
        key: value.to(torch.float8_e5m2) if value.is_floating_point() else value
        for key, value in fcos('FCOSHead', 1).state_dict().items()
    }
    torch.save(dict(state_dict=state), tmp_path / 'float.pth')
    detector = fcos('FCOSHead', 2)
    load_float_checkpoint(detector, str(tmp_path / 'float.pth'))
    assert torch.equal(detector.state_dict()[KEY], state[KEY].float())
    state[KEY].view(torch.uint8).fill_(0x7F)
    torch.save(dict(state_dict=state), tmp_path / 'float.pth')
    with pytest.raises(PTQError, match=f'{KEY} of float.pth holds NaN'):
        load_float_checkpoint(detector, str(tmp_path / 'float.pth'))


@pytest.mark.parametrize(
    ('wrap', 'told'),
    [
        (lambda state: dict(state_dict=dict(state_dict=state)), "Its tensors stand in 'state_dict.state_dict'"),
        (lambda state: dict(ema_state_dict=state), "Its tensors stand in 'ema_state_dict': save them as dict"),
        (lambda state: dict(epoch=3, model=state), "Its tensors stand in 'model'"),
        (lambda state: dict(state_dict={}), 'give a checkpoint written by mmdet.'),
        (lambda state: {f'model.{key}': value for key, value in state.items()}, "begin with 'model.', and those"),
        (lambda state: {f'module.module.{key}': value for key, value in state.items()}, "begin with 'module.', and"),
        (lambda state: {f'model.{key}': value for key, value in list(state.items())[3:]}, 'does not fit the model'),
    ],
)
def test_where_other_programs_put_their_weights_is_told(tmp_path, wrap, told):
    torch.save(wrap(fcos('FCOSHead', 1).state_dict()), tmp_path / 'float.pth')
    with pytest.raises(PTQError) as error:
        load_float_checkpoint(fcos('FCOSHead', 2), str(tmp_path / 'float.pth'))
    assert told in str(error.value)
