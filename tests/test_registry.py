"""Names in our registries: found however a config may spell them, and nothing else is looked at or imported."""

import sys

import pytest
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import Registry

from mmdet_ptq.datasets import EmbeddedDataset
from mmdet_ptq.quantizers import AffineQuantizer, MinMaxObserver
from mmdet_ptq.registry import DATASETS, OBSERVERS, QUANTIZERS, SCOPE, name_by_path, registered


@pytest.mark.parametrize(
    'name',
    [
        'AffineQuantizer',
        'mmdet_ptq.AffineQuantizer',
        'mmdet_ptq.quantizers.AffineQuantizer',
        'mmdet_ptq.quantizers.affine.AffineQuantizer',
    ],
)
def test_a_name_is_found_with_and_without_its_scope_and_by_its_path(name):
    assert registered(QUANTIZERS, name) is AffineQuantizer
    assert registered(OBSERVERS, name) is None


@pytest.mark.parametrize(
    'name',
    [
        '',
        '.',
        'mmdet_ptq.',
        'affinequantizer',
        'mmdet_ptq.mmdet_ptq.AffineQuantizer',
        'mmdet_ptq.quantizers.build_quantizer',  # it stands there, and is no format
        'mmdet_ptq.quantizers.affine.MinMaxObserver',
        'os.system',
    ],
)
def test_what_is_not_registered_is_not_found(name):
    assert registered(QUANTIZERS, name) is None


def test_nothing_is_imported_to_find_a_name():
    assert registered(QUANTIZERS, 'antigravity.fly') is None and 'antigravity' not in sys.modules


def test_a_class_that_is_registered_under_another_name_is_found_by_its_path(monkeypatch):
    own = Registry('own', scope=SCOPE)
    own.register_module(name='short', module=MinMaxObserver)
    assert name_by_path(own, 'mmdet_ptq.quantizers.observers.MinMaxObserver') == 'short'
    # where it is handed on, too, by whatever name
    monkeypatch.setattr(sys.modules[__name__], 'handed_on', MinMaxObserver, raising=False)
    assert name_by_path(own, f'{__name__}.handed_on') == 'short'
    assert name_by_path(own, 'short') is None and name_by_path(own, 'mmdet_ptq.quantizers.MSEObserver') is None


def test_scoped_names_are_found_from_the_root_registries_of_mmengine():
    assert MMENGINE_DATASETS.get(f'{SCOPE}.EmbeddedDataset') is EmbeddedDataset
    assert DATASETS.parent is MMENGINE_DATASETS and QUANTIZERS.parent is None
