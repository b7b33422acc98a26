"""A complete config around a tiny detector: data, evaluator, checkpoint and ``ptq`` block."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from mmengine.config import Config

from mmdet_ptq.testing.data import CLASSES, tiny_coco
from mmdet_ptq.testing.detectors import tiny_detector
from mmdet_ptq.testing.models import SIZE, tiny_model_cfg


def tiny_config(kind: str, folder: str | os.PathLike, seed: int = 0) -> Config:
    """Writes a tiny COCO and a float checkpoint, and returns the config that uses them.

    Args:
        kind: See :func:`mmdet_ptq.testing.tiny_model_cfg`.
        folder: Gets the data set (:func:`tiny_coco`), ``float.pth`` and, from a run, ``work_dir/``.
        seed: Seed of the data and of the weights. Defaults to 0.

    Returns:
        An mmdet config with ``load_from``, ``work_dir`` and a short ``ptq`` block; a whole run takes seconds.
        ``config.dump(path)`` makes a file of it.
    """
    folder = Path(folder)
    tiny_coco(folder, seed=seed)
    checkpoint = folder / 'float.pth'
    torch.save(dict(state_dict=tiny_detector(kind, seed).state_dict(), meta={}), checkpoint)
    evaluator = dict(type='CocoMetric', ann_file=str(folder / 'annotations' / 'instances_val.json'), metric='bbox')
    test_dataloader = _dataloader(folder, 'val', _pipeline(training=False), test_mode=True)
    return Config(
        dict(
            default_scope='mmdet',
            model=tiny_model_cfg(kind),
            train_dataloader=_dataloader(folder, 'train', _pipeline(training=True)),
            val_dataloader=test_dataloader,
            test_dataloader=test_dataloader,
            val_evaluator=evaluator,
            test_evaluator=evaluator,
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
            val_cfg=dict(type='ValLoop'),
            test_cfg=dict(type='TestLoop'),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3)),
            default_hooks=dict(timer=dict(type='IterTimerHook'), logger=dict(type='LoggerHook', interval=1)),
            env_cfg=dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0), dist_cfg=dict(backend='gloo')),
            visualizer=dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer'),
            log_level='INFO',
            load_from=str(checkpoint),
            work_dir=str(folder / 'work_dir'),
            randomness=dict(seed=seed),
            ptq=dict(
                preset='w8a8',
                calibration=dict(num_images=6, batch_size=2),
                global_loss=dict(
                    iters=4, batch_size=2, holdout=0.34, val_interval=2, checkpoint_interval=2, log_interval=1
                ),
            ),
        )
    )


def _dataloader(folder: Path, split: str, pipeline: list[dict], **kwargs) -> dict:
    return dict(
        batch_size=2,
        num_workers=0,
        persistent_workers=False,
        sampler=dict(type='DefaultSampler', shuffle=split == 'train'),
        dataset=dict(
            type='CocoDataset',
            data_root=str(folder),
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'{split}/'),
            metainfo=dict(classes=CLASSES),
            pipeline=pipeline,
            **kwargs,
        ),
    )


def _pipeline(training: bool) -> list[dict]:
    flip = [dict(type='RandomFlip', prob=0.5)] if training else []
    return [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=True),
        *flip,
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ]
