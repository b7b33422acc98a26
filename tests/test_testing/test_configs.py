"""A config of a tiny detector is one that mmdet reads, with everything that it names on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_ptq.calibration import source_datasets
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing.configs import tiny_config
from mmdet_ptq.testing.data import CLASSES
from mmdet_ptq.testing.detectors import tiny_detector
from mmdet_ptq.testing.models import SIZE


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> tuple[Config, Path]:
    folder = tmp_path_factory.mktemp('tiny')
    init_default_scope('mmdet')
    return tiny_config('retinanet', folder, seed=3), folder


def test_the_checkpoint_is_the_tiny_detectors(made):
    cfg, folder = made
    assert Path(cfg.load_from).parent == folder
    stored = torch.load(cfg.load_from, weights_only=True)['state_dict']
    expected = tiny_detector('retinanet', seed=3).state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())


@pytest.mark.parametrize('loader, split', [('train', 'train'), ('val', 'val'), ('test', 'val')])
def test_the_data_sets_are_read_as_their_pipelines_say(made, loader, split):
    cfg, folder = made
    dataset = DATASETS.build(cfg[f'{loader}_dataloader'].dataset)
    assert len(dataset) == 8 and dataset.metainfo['classes'] == CLASSES
    item = dataset[0]
    assert item['inputs'].shape == (3, SIZE, SIZE)
    assert Path(item['data_samples'].img_path) == folder / split / '000000.png'
    assert len(item['data_samples'].gt_instances) > 0
    types = [type(step).__name__ for step in dataset.pipeline.transforms]
    assert ('RandomFlip' in types) == (loader == 'train')


def test_annotated_boxes_give_a_perfect_figure(made):
    cfg, _ = made
    metric = METRICS.build(cfg.test_evaluator)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        sample = dataset[index]['data_samples']
        truth = sample.gt_instances
        found = dict(bboxes=truth.bboxes.tensor, labels=truth.labels, scores=torch.ones(len(truth)))
        metric.process({}, [dict(sample.to_dict(), pred_instances=found)])
    assert metric.evaluate(len(dataset))['coco/bbox_mAP'] == 1


def test_a_file_of_it_says_the_same(made, tmp_path):
    cfg, _ = made
    cfg.dump(tmp_path / 'tiny.py')
    assert Config.fromfile(tmp_path / 'tiny.py').to_dict() == cfg.to_dict()


def test_the_block_is_read_and_finds_its_images(made):
    cfg, _ = made
    block = PTQConfig.from_dict(cfg.ptq)
    assert block.global_loss.iters == 4 and block.calibration.num_images == 6
    (dataset,) = source_datasets(cfg, block.calibration, False)
    assert len(dataset) >= block.calibration.num_images
    assert cfg.randomness.seed == 3 and cfg.model.type == 'RetinaNet'


def test_nothing_is_run(made):
    cfg, folder = made
    assert Path(cfg.work_dir).parent == folder and not Path(cfg.work_dir).exists()
    assert {path.name for path in folder.iterdir()} == {'annotations', 'train', 'val', 'float.pth'}


def test_an_unknown_kind_is_told(tmp_path):
    with pytest.raises(PTQError, match="there is no tiny detector 'resnet'"):
        tiny_config('resnet', str(tmp_path))
