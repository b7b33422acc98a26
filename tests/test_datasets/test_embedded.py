from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

CONFIGS = Path(__file__).parents[2] / 'configs'
FEW = dict(train=4, val=3)


@pytest.fixture(scope='module')
def cfg(tmp_path_factory):
    cfg = Config.fromfile(CONFIGS / 'ssdlite_mbv2_float.py')
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.data_root = str(tmp_path_factory.getbasetemp() / 'embedded')
        dataset.num_images = FEW
    init_default_scope(cfg.default_scope)
    return cfg


def test_scoped_type_builds_both_splits(cfg):
    from mmdet.registry import DATASETS

    from mmdet_ptq.datasets import EmbeddedDataset

    train, val = (DATASETS.build(cfg[f'{split}_dataloader'].dataset) for split in ('train', 'val'))
    assert type(train) is type(val) is EmbeddedDataset
    assert (len(train), len(val)) == (4, 3)
    assert len(train.metainfo['classes']) == cfg.num_classes >= 6
    assert len(train.metainfo['palette']) == cfg.num_classes
    ids = [{dataset.get_data_info(i)['img_id'] for i in range(len(dataset))} for dataset in (train, val)]
    assert not ids[0] & ids[1]


def test_labels_follow_the_classes(cfg):
    from mmdet.registry import DATASETS

    from mmdet_ptq.datasets.scenes import make_scene

    val = DATASETS.build(cfg.val_dataloader.dataset)
    for index in range(len(val)):
        scene, info = make_scene(0, 1, index), val.get_data_info(index)
        assert [i['bbox_label'] for i in info['instances']] == [p.label for p in scene.placements]
        assert np.array_equal([i['bbox'] for i in info['instances']], scene.boxes)
        item = val[index]
        assert item['inputs'].shape == (3, cfg.input_size, cfg.input_size) and item['inputs'].dtype == torch.uint8


def test_detector_trains_and_predicts(cfg):
    import mmdet.models  # noqa: F401
    from mmdet.registry import DATASETS, MODELS
    from mmengine.dataset import pseudo_collate

    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    assert 4 * sum(value.numel() for value in model.state_dict().values()) < 10e6
    train = DATASETS.build(cfg.train_dataloader.dataset)
    losses = model(**model.data_preprocessor(pseudo_collate([train[0], train[1]]), True), mode='loss')
    assert all(torch.isfinite(torch.stack(values)).all() for values in losses.values())
    val = DATASETS.build(cfg.val_dataloader.dataset)
    results = model.eval()(**model.data_preprocessor(pseudo_collate([val[0]]), False), mode='predict')
    assert results[0].pred_instances.bboxes.shape[1] == 4


def test_shipped_checkpoint_is_plain_small_and_fits(cfg):
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS

    path = Path(Config.fromfile(CONFIGS / 'ssdlite_mbv2_ptq.py').load_from)
    assert path.stat().st_size < 10e6
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        checkpoint = torch.load(path, weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)
    assert set(checkpoint) == {'state_dict', 'meta'}
    MODELS.build(cfg.model).load_state_dict(checkpoint['state_dict'], strict=True)
    from mmdet_ptq.datasets import EmbeddedDataset

    assert tuple(checkpoint['meta']['dataset_meta']['classes']) == EmbeddedDataset.METAINFO['classes']
