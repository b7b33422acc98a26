"""A config's detector, built as mmdet's runner would: its preprocessor, its imports, and the config as it was."""

import sys

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from mmdet_ptq.deploy.network.build import build_detector


class Own(nn.Module):
    def __init__(self, data_preprocessor=None, norm_cfg=None, **others):
        super().__init__()
        self.given = dict(data_preprocessor=data_preprocessor, norm_cfg=norm_cfg, **others)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MODELS.module_dict, 'Own', Own)


def test_the_preprocessor_of_the_config_is_that_of_a_model_without_one():
    outside = dict(type='DetDataPreprocessor', pad_size_divisor=32)
    built = build_detector(Config(dict(model=dict(type='Own', width=3), data_preprocessor=outside)))
    assert built.given == dict(data_preprocessor=outside, norm_cfg=None, width=3)
    inside = dict(type='DetDataPreprocessor', pad_size_divisor=16)
    config = Config(dict(model=dict(type='Own', data_preprocessor=inside), data_preprocessor=outside))
    assert build_detector(config).given['data_preprocessor'] == inside
    assert build_detector(Config(dict(model=dict(type='Own')))).given['data_preprocessor'] is None


def test_synchronized_norms_become_plain_ones_and_the_config_stays():
    config = Config(dict(model=dict(type='Own', norm_cfg=dict(type='SyncBN', eps=1e-3)), data_preprocessor=dict(a=1)))
    before = config.to_dict()
    norm = build_detector(config).given['norm_cfg']
    assert norm['type'] == 'BN' and norm['eps'] == 1e-3
    assert config.to_dict() == before
    build_detector(config).given['norm_cfg']['eps'] = 0
    assert config.to_dict() == before


def test_custom_imports_come_before_the_detector_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / 'own_detectors_of_a_test.py').write_text(
        'from mmdet.registry import MODELS\n\n\n'
        "@MODELS.register_module('Imported')\n"
        'def build(**given):\n'
        '    return given\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    imports = dict(imports=['own_detectors_of_a_test'], allow_failed_imports=False)
    try:
        assert build_detector(Config(dict(custom_imports=imports, model=dict(type='Imported', a=1)))) == dict(a=1)
    finally:
        MODELS.module_dict.pop('Imported', None)
        sys.modules.pop('own_detectors_of_a_test', None)


def test_names_are_those_of_mmdet_unless_the_config_names_another_scope():
    build_detector(Config(dict(model=dict(type='Own'))))
    assert DefaultScope.get_current_instance().scope_name == 'mmdet'
    build_detector(Config(dict(model=dict(type='mmdet.Own'), default_scope='mmengine')))
    assert DefaultScope.get_current_instance().scope_name == 'mmengine'
    build_detector(Config(dict(model=dict(type='Own'), default_scope=None)))
    assert DefaultScope.get_current_instance().scope_name == 'mmdet'
