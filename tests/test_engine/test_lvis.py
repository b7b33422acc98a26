"""Data sets in LVIS's format: with the package `lvis` as any other; without it, one sentence."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_ptq.calibration import source_datasets
from mmdet_ptq.config import CalibrationConfig
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_config

HAS_LVIS = find_spec('lvis') is not None


@pytest.fixture
def cfg(tmp_path) -> Config:
    """The tiny COCO, written as LVIS is."""
    cfg = tiny_config('retinanet', tmp_path)
    for split in ('train', 'val'):
        change(tmp_path, split, to_lvis)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.type, loader.dataset.data_prefix = 'LVISV1Dataset', dict(img='')
    cfg.test_evaluator = dict(type='LVISMetric', ann_file=str(tmp_path / 'annotations' / 'instances_val.json'))
    # as LVIS's own configs
    cfg.train_dataloader.dataset = dict(
        type='ClassBalancedDataset', oversample_thr=1e-3, dataset=cfg.train_dataloader.dataset
    )
    cfg.ptq = dict(preset='w8a8_observe', calibration=dict(num_images=4))
    return cfg


def change(folder: Path, split: str, act) -> None:
    path = folder / 'annotations' / f'instances_{split}.json'
    content = json.loads(path.read_text())
    act(content, split)
    path.write_text(json.dumps(content))


def to_lvis(content: dict, split: str) -> None:
    for image in content['images']:
        image['coco_url'] = f'http://images.cocodataset.org/{split}/{image.pop("file_name")}'
        image.update(not_exhaustive_category_ids=[], neg_category_ids=[1, 2, 3])
    for box in content['annotations']:
        del box['iscrowd']
        x, y, w, h = box['bbox']
        box['segmentation'] = [[x, y, x + w, y, x + w, y + h]]
    for category, frequency in zip(content['categories'], 'rcf', strict=True):
        category.update(frequency=frequency, image_count=1, instance_count=1)


@pytest.mark.skipif(not HAS_LVIS, reason='needs the package lvis')
def test_a_detector_is_quantized_and_evaluated_on_lvis(cfg):
    results = PTQRunner.from_cfg(cfg).run()
    for row in results['rows']:
        assert {'lvis/bbox_AP', 'lvis/bbox_APr'} <= row['metrics'].keys()
    assert len(results['calibration']['image_ids']) == 4


@pytest.mark.skipif(HAS_LVIS, reason='needs an environment without the package lvis')
def test_without_the_package_it_is_named(cfg):
    with pytest.raises(PTQError, match='`test_dataloader.dataset` .*needs a package.*lvis'):
        PTQRunner.from_cfg(cfg).load()
    with pytest.raises(PTQError, match='lvis'):
        source_datasets(cfg, CalibrationConfig())


@pytest.mark.parametrize('split', ['train', 'val'])
def test_what_lacks_in_a_file_of_lvis_is_named(cfg, tmp_path, split):
    change(tmp_path, split, lambda content, _: content['images'][2].pop('coco_url'))
    with pytest.raises(PTQError, match='`images` with the id 3 has no `coco_url`'):
        if split == 'train':
            source_datasets(cfg, CalibrationConfig())
        else:
            PTQRunner.from_cfg(cfg).load()
