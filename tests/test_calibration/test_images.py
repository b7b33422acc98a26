import copy
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope

from mmdet_ptq.calibration import CalibrationDataset, LoadedSamples, source_datasets
from mmdet_ptq.calibration import images as data_module
from mmdet_ptq.calibration.images import content_hash, inner_dataset_cfgs, test_pipeline
from mmdet_ptq.config import CalibrationConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_batch, tiny_config

test_pipeline.__test__ = False


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
    init_default_scope('mmdet')
    return tiny_config('retinanet', tmp_path_factory.mktemp('coco'))


@pytest.fixture
def cfg(pristine):
    return copy.deepcopy(pristine)


@pytest.fixture
def own(tmp_path):
    """A config with a data set of its own, to damage."""
    return tiny_config('retinanet', tmp_path)


def _draw(cfg, num_images=8, seed=0, evaluation=None, **kwargs):
    sources = source_datasets(cfg, CalibrationConfig(**kwargs))
    return CalibrationDataset(sources, num_images, seed, evaluation)


def _root(cfg) -> Path:
    return Path(cfg.train_dataloader.dataset.data_root)


WRAPPERS = {
    'repeat': lambda d: dict(type='RepeatDataset', times=3, dataset=d),
    'balanced': lambda d: dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=d),
    'multi image': lambda d: dict(type='MultiImageMixDataset', dataset=d, pipeline=[dict(type='Mosaic')]),
    'nested': lambda d: dict(
        type='MultiImageMixDataset',
        pipeline=[],
        dataset=dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[d])),
    ),
}


@pytest.mark.parametrize('wrapper', WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_taken_off(cfg, wrapper):
    plain = cfg.train_dataloader.dataset
    expected = _draw(cfg)
    cfg.train_dataloader.dataset = wrapper(plain)
    assert inner_dataset_cfgs(cfg.train_dataloader.dataset) == [plain]
    drawn = _draw(cfg)
    assert drawn.ids == expected.ids
    assert torch.equal(drawn[0]['inputs'], expected[0]['inputs'])


def test_concatenated_sets_are_all_drawn_from(cfg):
    train, val = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[train, val])
    drawn = _draw(cfg, 16)
    assert len(drawn) == 16
    folders = {Path(drawn[i]['data_samples'].img_path).parent.name for i in range(16)}
    assert folders == {'train', 'val'}


def test_images_pass_the_test_pipeline(cfg):
    cfg.test_dataloader.dataset.pipeline[2].scale = (32, 32)
    drawn = _draw(cfg, 2)
    assert drawn[0]['inputs'].shape == (3, 32, 32)
    assert 'flip' not in drawn[0]['data_samples'].metainfo


def test_the_draw_is_seeded_and_stable(cfg):
    assert _draw(cfg, 4).ids == _draw(cfg, 4).ids == _draw(cfg, 8).ids[:4]
    assert _draw(cfg, 8, seed=1).ids != _draw(cfg, 8).ids
    assert sorted(_draw(cfg, 8, seed=1).ids) == list(range(1, 9))
    drawn = _draw(cfg, 8)
    assert [drawn[i]['data_samples'].img_id for i in range(8)] == drawn.ids


def test_copies_of_evaluation_images_are_refused(cfg, tmp_path):
    evaluation = DATASETS.build(cfg.test_dataloader.dataset)
    copies = Path(shutil.copytree(_root(cfg) / 'val', tmp_path / 'copies'))
    (copies / '000000.png').rename(copies / 'other_name.png')
    with pytest.raises(PTQError, match='8 calibration images are also evaluation images, or copies of them'):
        _draw(cfg, 8, evaluation=evaluation, images=str(copies))
    # another image of the same size in bytes is none
    for path in copies.glob('*.png'):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert len(_draw(cfg, 8, evaluation=evaluation, images=str(copies))) == 8


def test_fewer_images_than_asked_for(cfg):
    assert len(_draw(cfg, 100)) == 8


def test_evaluation_images_are_refused(cfg):
    evaluation = DATASETS.build(cfg.test_dataloader.dataset)
    assert len(_draw(cfg, 8, evaluation=evaluation)) == 8
    # the same files under another spelling of their folder
    root = str(_root(cfg) / 'val' / '..')
    dataset = dict(copy.deepcopy(cfg.val_dataloader.dataset), data_root=root)
    with pytest.raises(PTQError, match='3 calibration images are also evaluation images.*ptq.calibration.dataset'):
        _draw(cfg, 3, evaluation=evaluation, dataset=dataset)


def test_ids_of_two_sets_may_be_equal(cfg):
    # both number their images from 1; only the file tells them apart
    evaluation = DATASETS.build(cfg.test_dataloader.dataset)
    assert _draw(cfg, 8, evaluation=evaluation).ids


@pytest.mark.parametrize('through', ['train', 'calibration'])
def test_missing_annotation_file_is_named(cfg, through):
    dataset = copy.deepcopy(cfg.train_dataloader.dataset)
    dataset.ann_file = 'annotations/none.json'
    kwargs = {}
    if through == 'train':
        cfg.train_dataloader.dataset = dataset
    else:
        kwargs = dict(dataset=dataset)
    with pytest.raises(PTQError, match=r'dataset` needs the file .*none\.json') as error:
        _draw(cfg, **kwargs)
    assert '\n' not in str(error.value)
    assert ('ptq.calibration.dataset' in str(error.value)) == (through == 'calibration')


def test_empty_set(own):
    path = _root(own) / 'annotations' / 'instances_train.json'
    path.write_text(json.dumps(dict(json.loads(path.read_text()), images=[], annotations=[])))
    with pytest.raises(PTQError, match='calibration set is empty'):
        _draw(own)


def test_images_without_objects_count_too(own):
    path = _root(own) / 'annotations' / 'instances_train.json'
    path.write_text(json.dumps(dict(json.loads(path.read_text()), annotations=[])))
    assert len(_draw(own)) == 8


@pytest.mark.parametrize('content', [b'no image', b'', None])
def test_an_unreadable_image_is_named_skipped_and_counted(own, content, monkeypatch):
    path = _root(own) / 'train' / '000003.png'
    path.unlink() if content is None else path.write_bytes(content)
    lines = []
    monkeypatch.setattr(data_module, 'print_log', lambda text, *_, **__: lines.append(text))
    drawn = _draw(own)
    assert len(drawn) == len(drawn.ids) == 7
    assert 4 not in drawn.ids
    assert drawn.skipped == [str(path.resolve())]
    assert any(str(path.resolve()) in line and 'skipped' in line for line in lines)
    assert '1 of 8 calibration images were skipped' in lines


def test_no_readable_image(own):
    for path in (_root(own) / 'train').iterdir():
        path.write_bytes(b'no image')
    with pytest.raises(PTQError, match='none of the 8 calibration images can be read'):
        _draw(own)


def test_a_folder_without_annotations(own):
    folder = _root(own) / 'train'
    (folder / 'notes.txt').write_text('no image')
    own.pop('train_dataloader')
    drawn = _draw(own, 5, images=str(folder))
    assert len(drawn) == 5
    assert set(drawn.ids) <= {str(p) for p in folder.glob('*.png')}
    assert drawn[0]['inputs'].shape == (3, 64, 64)


def test_an_empty_and_a_missing_folder(cfg, tmp_path):
    with pytest.raises(PTQError, match='calibration set is empty'):
        _draw(cfg, images=str(tmp_path))
    with pytest.raises(PTQError, match='`ptq.calibration.images` names .* no folder'):
        _draw(cfg, images=str(tmp_path / 'none'))


def test_no_training_set(cfg):
    cfg.pop('train_dataloader')
    with pytest.raises(PTQError, match='no `train_dataloader`.*ptq.calibration.images'):
        _draw(cfg)


def test_no_test_pipeline(cfg):
    cfg.pop('test_dataloader')
    cfg.pop('val_dataloader')
    with pytest.raises(PTQError, match='test_dataloader.dataset.pipeline'):
        _draw(cfg)


@pytest.mark.parametrize('limit', [0, 1 << 30])
def test_predictions_do_not_stay_in_the_samples(cfg, monkeypatch, limit):
    monkeypatch.setattr(data_module, 'MEMORY_LIMIT', limit)
    drawn = _draw(cfg, 2)
    sample = drawn[0]
    sample['data_samples'].pred_instances = sample['data_samples'].gt_instances
    sample['data_samples'].gt_instances.labels += 100
    again = drawn[0]
    assert 'pred_instances' not in again['data_samples']
    assert again['data_samples'].gt_instances.labels.max() < 3
    assert torch.equal(again['inputs'], sample['inputs'])


def test_part(cfg):
    drawn = _draw(cfg, 4)
    part = drawn.part([2, 3])
    assert [part[i]['data_samples'].img_id for i in range(2)] == drawn.ids[2:]
    assert part.metainfo['classes'] == ('red', 'green', 'blue')


def test_content_knows_other_images_and_boxes_of_the_same_ids(cfg, own):
    again, first = _draw(copy.deepcopy(cfg), 4), _draw(cfg, 4)
    assert first.content == again.content
    annotations = _root(own) / own.train_dataloader.dataset.ann_file
    moved = json.loads(annotations.read_text())
    for annotation in moved['annotations']:
        annotation['bbox'][2] += 1
    annotations.write_text(json.dumps(moved))
    boxes = _draw(own, 4)
    path = boxes.datasets[0].get_data_info(int(boxes.ids[0]) - 1)['img_path']
    mmcv.imwrite(mmcv.imread(path) // 2, path)
    image = _draw(own, 4)
    assert boxes.ids == image.ids == first.ids
    assert len({first.content, boxes.content, image.content}) == 3


def test_a_voc_set_is_calibrated_on_with_its_stock_filter(tmp_path):
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (tmp_path / 'VOC2007' / name).mkdir(parents=True)
    for name in ('one', 'two'):
        mmcv.imwrite(np.zeros((64, 64, 3), np.uint8), str(tmp_path / 'VOC2007' / 'JPEGImages' / f'{name}.jpg'))
        (tmp_path / 'VOC2007' / 'Annotations' / f'{name}.xml').write_text(
            '<annotation><size><width>64</width><height>64</height></size><object><name>dog</name>'
            '<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>40</xmax><ymax>40</ymax></bndbox></object></annotation>'
        )
    (tmp_path / 'VOC2007' / 'ImageSets' / 'Main' / 'train.txt').write_text('one\ntwo\n')
    voc = dict(
        type='VOCDataset',
        data_root=f'{tmp_path}/',
        ann_file='VOC2007/ImageSets/Main/train.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32, bbox_min_size=32),
    )
    cfg = dict(
        train_dataloader=dict(dataset=dict(type='RepeatDataset', times=3, dataset=voc)),
        test_dataloader=dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])),
    )
    assert [len(dataset) for dataset in source_datasets(cfg, CalibrationConfig())] == [2]


def test_content_does_not_depend_on_the_order_of_the_fields_of_a_sample():
    """mmengine's order is that of a set of names, another in every process."""
    fields = dict(labels=torch.tensor([1, 2]), bboxes=torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5]]))
    digests = []
    for instances in (fields, dict(reversed(fields.items())), fields | dict(labels=torch.tensor([2, 1]))):
        digests.append(hashlib.sha256())
        sample = dict(inputs=torch.ones(3, 2, 2), data_samples=SimpleNamespace(gt_instances=instances))
        content_hash(digests[-1], sample)
    first, other_order, other_labels = (digest.hexdigest() for digest in digests)
    assert first == other_order != other_labels


def test_content_of_the_users_own_batches():
    contents = [LoadedSamples([tiny_batch(2, seed)]).content for seed in (0, 0, 1)]
    assert contents[0] == contents[1] != contents[2]


def test_batches_of_the_users_own_loader():
    drawn = LoadedSamples([tiny_batch(2), tiny_batch(1)])
    assert len(drawn) == 3
    assert drawn.ids == [0, 1, 0]
    drawn[0]['data_samples'].set_metainfo(dict(img_id=7))
    assert drawn[0]['data_samples'].img_id == 0
    assert drawn[0]['inputs'].shape == (3, 64, 64)
    with pytest.raises(PTQError, match='loader is empty'):
        LoadedSamples([])


def test_what_is_no_file_in_a_folder_of_images_is_no_image(own, tmp_path):
    folder = tmp_path / 'images'
    shutil.copytree(_root(own) / 'train', folder)
    # to open a pipe waits for somebody who writes
    os.mkfifo(folder / 'pipe.png')
    (folder / 'folder.png').mkdir()
    (folder / 'nowhere.png').symlink_to(folder / 'gone.png')
    drawn = _draw(own, 20, images=str(folder))
    assert len(drawn) == 8 and not drawn.skipped
