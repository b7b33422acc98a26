"""A quantized detector is trained further with mmdet's own loop, losses and labels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from mmdet_ptq import PTQError, load_quantized
from mmdet_ptq.deploy import read_quantized
from mmdet_ptq.engine.label_training import train_quantized
from mmdet_ptq.testing import tiny_batch
from mmdet_ptq.testing.calibrated import raw_outputs

SCHEDULE = dict(
    train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=6, val_interval=6),
    param_scheduler=[dict(type='LinearLR', start_factor=0.5, by_epoch=False, begin=0, end=3)],
    default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3)),
    optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e9), clip_grad=dict(max_norm=35)),
)


@pytest.fixture
def training(config_file, tmp_path):
    cfg = Config.fromfile(config_file)
    cfg.merge_from_dict(copy.deepcopy(SCHEDULE))
    cfg.work_dir, cfg.experiment_name = str(tmp_path / 'trained'), tmp_path.name
    cfg.ptq = dict(preset='w4a4')
    return cfg


def test_a_quantized_detector_learns_and_stays_one(finished, training):
    source = Path(finished.work_dir) / 'quantized.pth'
    before, after = (read_quantized(path) for path in (source, train_quantized(training, source)))
    # the same formats, other codes
    assert before['layers'] == after['layers'] and before['structure'] == after['structure']
    assert before['config'] == after['config'] and before['input_shape'] == after['input_shape']
    assert not torch.equal(before['codes']['data']['uint8'], after['codes']['data']['uint8'])
    outputs = [
        raw_outputs(load_quantized(p), tiny_batch()) for p in (source, Path(training.work_dir) / 'quantized.pth')
    ]
    assert all(torch.isfinite(output).all() for output in outputs[1])
    assert any(not torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.thorough
def test_more_labels_mean_less_of_mmdets_own_loss(finished, training):
    training.train_cfg.max_iters = training.train_cfg.val_interval = 20
    source, dataset = Path(finished.work_dir) / 'quantized.pth', DATASETS.build(training.train_dataloader.dataset)
    batch = pseudo_collate([dataset[index] for index in range(len(dataset))])
    train_quantized(training, source)

    def loss(path):
        detector = load_quantized(path)
        with torch.no_grad():
            losses = detector(**detector.data_preprocessor(copy.deepcopy(batch), False), mode='loss')
        return float(sum(torch.as_tensor(value).sum() for values in losses.values() for value in _listed(values)))

    assert loss(Path(training.work_dir) / 'quantized.pth') < loss(source)


def _listed(values):
    return values if isinstance(values, list) else [values]


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (dict(train_dataloader=None), 'has no `train_dataloader`'),
        (dict(ptq=dict(preset='w8a8')), '`ptq.global_loss.weight_lr` is 0'),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(finished, training, change, told):
    for key, value in change.items():
        training[key] = value
    with pytest.raises(PTQError, match=told):
        train_quantized(training, Path(finished.work_dir) / 'quantized.pth')
