"""Mistakes in the evaluation are told before anything is calibrated."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
from mmengine.config import Config

from mmdet_ptq.analysis.table import closing_lines
from mmdet_ptq.engine.evaluation import NOTHING_FOUND, figures, image_sizes
from mmdet_ptq.errors import PTQError


@pytest.fixture
def annotations(config_file, tmp_path):
    """Writes the evaluation's annotations anew, changed."""
    original = json.loads(next((config_file.parent).rglob('*val*.json')).read_text())

    def write(change) -> str:
        changed = json.loads(json.dumps(original))
        change(changed)
        path = tmp_path / 'changed.json'
        path.write_text(json.dumps(changed))
        return str(path)

    return write


def interrupted(*args) -> None:
    raise KeyboardInterrupt


def refused(make_runner, changes: dict, tmp_path: Path) -> str:
    with pytest.raises(PTQError) as caught:
        make_runner(changes).run()
    assert not list((tmp_path / 'work_dir').glob('stages/*.pth'))  # nothing was done yet
    return str(caught.value)


def test_classes_that_the_annotations_lack_are_named(make_runner, tmp_path):
    said = refused(make_runner, {'test_dataloader.dataset.metainfo': dict(classes=('red', 'gren', 'blue'))}, tmp_path)
    assert "names 'gren', which `test_evaluator.ann_file` does not have; its categories are red, green, blue" in said


def test_images_that_cannot_be_read_are_named(make_runner, tmp_path):
    said = refused(make_runner, {'test_dataloader.dataset.data_prefix': dict(img='nowhere/')}, tmp_path)
    assert 'nowhere/' in said and 'check `test_dataloader.dataset`' in said


def test_images_that_no_reader_knows_are_told(make_runner, config_file, tmp_path):
    shutil.copytree(config_file.parent / 'val', tmp_path / 'val')
    for image in (tmp_path / 'val').glob('*.png'):
        image.write_bytes(b'no image')
    pipeline = copy.deepcopy(Config.fromfile(config_file).test_dataloader.dataset.pipeline)
    pipeline[0]['imdecode_backend'] = 'pillow'  # its error is an OSError
    said = refused(
        make_runner,
        {
            'test_dataloader.dataset.data_prefix': dict(img=f'{tmp_path}/val/'),
            'test_dataloader.dataset.pipeline': pipeline,
        },
        tmp_path,
    )
    assert 'evaluation image' in said and '.png cannot be read: UnidentifiedImageError' in said


def test_annotations_of_other_images_are_refused(make_runner, annotations, tmp_path):
    def renumber(content):
        for image in content['images']:
            image['id'] += 1000
        for box in content['annotations']:
            box['image_id'] += 1000

    said = refused(make_runner, {'test_evaluator.ann_file': annotations(renumber)}, tmp_path)
    assert 'are not in `test_evaluator.ann_file`' in said


def test_an_evaluation_without_images_is_refused(make_runner, annotations, tmp_path):
    path = annotations(lambda content: content.update(images=[], annotations=[]))
    said = refused(make_runner, {'test_dataloader.dataset.ann_file': path}, tmp_path)
    assert said.startswith('the evaluation has no images; check `test_dataloader.dataset`')


def test_broken_annotations_are_refused(make_runner, tmp_path):
    path = tmp_path / 'broken.json'
    path.write_text('{"images": [')
    said = refused(make_runner, {'test_evaluator.ann_file': str(path)}, tmp_path)
    assert said.startswith('`test_evaluator.ann_file`: the annotation file') and 'is no valid JSON' in said


def test_a_float_detector_that_finds_nothing_is_warned_of_before_the_calibration(make_runner, monkeypatch):
    said = []
    monkeypatch.setattr('mmdet_ptq.engine.evaluation.print_log', lambda message, *args, **kwargs: said.append(message))
    runner = make_runner({'ptq.global_loss': None})
    monkeypatch.setattr(runner, 'evaluate_detector', lambda *args: {})
    monkeypatch.setattr(runner, 'prepare', interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert NOTHING_FOUND in said


@pytest.mark.thorough
def test_results_of_the_checkpoint_before_are_taken_away(make_runner, finished_copy, monkeypatch):
    runner = make_runner(work_dir=finished_copy, resume=True)
    monkeypatch.setattr(runner, 'evaluate', interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert (finished_copy / 'quantized.pth').is_file()
    assert not (finished_copy / 'results.json').exists() and not (finished_copy / 'report.html').exists()


def test_fewer_classes_than_the_head_has_are_warned_of(make_runner, monkeypatch):
    said = []
    monkeypatch.setattr('mmdet_ptq.engine.evaluation.print_log', lambda message, *args, **kwargs: said.append(message))
    runner = make_runner({'test_dataloader.dataset.metainfo': dict(classes=('red', 'green'))})
    runner.begin()
    assert said == [
        'the detector has 3 classes, `test_dataloader.dataset.metainfo.classes` names 2; evaluators that '
        'look for the others fail.'
    ]


@pytest.fixture
def two_parts(config_file, tmp_path):
    """Changes that make the evaluation one of two data sets with other image ids, each with a metric of its own."""
    cfg, path = Config.fromfile(config_file), config_file.parent / 'annotations' / 'instances_val.json'
    second = json.loads(path.read_text())
    for image in second['images']:
        image['id'] += 1000
    for annotation in second['annotations']:
        annotation['image_id'] += 1000
    (tmp_path / 'second.json').write_text(json.dumps(second))
    first, other = (copy.deepcopy(cfg.test_dataloader.dataset) for _ in range(2))
    other.ann_file = str(tmp_path / 'second.json')
    other.metainfo = {**other.metainfo, 'palette': [(1, 2, 3)] * 3}  # the concatenation then has a list of metainfos
    metrics = [dict(type='CocoMetric', metric='bbox', ann_file=str(file)) for file in (path, tmp_path / 'second.json')]
    return {
        'test_dataloader.dataset': dict(_delete_=True, type='ConcatDataset', datasets=[first, other]),
        'test_evaluator': dict(
            _delete_=True, type='MultiDatasetsEvaluator', metrics=metrics, dataset_prefixes=['one', 'two']
        ),
        'ptq.global_loss': None,
    }


@pytest.mark.thorough
def test_each_metric_of_several_data_sets_is_checked_against_its_own(two_parts, make_runner):
    runner = make_runner(two_parts)
    runner.run()
    metrics = runner.results['rows'][-1]['metrics']
    assert metrics['one/coco/bbox_mAP'] == metrics['two/coco/bbox_mAP']
    assert runner.detector.dataset_meta['classes'] == ('red', 'green', 'blue')


def test_annotations_of_other_images_are_refused_in_a_part_too(two_parts, make_runner, tmp_path):
    metrics = two_parts['test_evaluator']['metrics']
    metrics[0]['ann_file'] = metrics[1]['ann_file']
    assert 'are not in `test_evaluator.ann_file`' in refused(make_runner, two_parts, tmp_path)


def test_an_evaluator_that_only_writes_files_is_told(make_runner, config_file, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr('mmdet_ptq.engine.evaluation.print_log', lambda text, *args, **kwargs: told.append(text))
    runner = make_runner({'test_evaluator.format_only': True, 'test_evaluator.outfile_prefix': str(tmp_path / 'out')})
    runner.begin()
    runner.evaluate_float()
    assert [text for text in told if 'format_only' in text and 'no figures' in text] and NOTHING_FOUND not in told


def test_figures_that_are_no_numbers_are_left_out(monkeypatch):
    told = []
    monkeypatch.setattr('mmdet_ptq.engine.evaluation.print_log', lambda text, *args, **kwargs: told.append(text))
    assert figures(dict(map=np.float32(0.5), copypaste='0.5 0.6', sizes=[1, 2])) == dict(map=0.5)
    assert len(told) == 2 and 'copypaste' in told[0]


def test_half_precision_is_left_out(make_runner):
    assert make_runner({'test_cfg': dict(type='TestLoop', fp16=True)})._test_loop == dict(type='TestLoop')


def test_any_image_that_cannot_be_read_is_named(make_runner, config_file, tmp_path):
    shutil.copytree(config_file.parent / 'val', tmp_path / 'val')
    (tmp_path / 'val' / '000005.png').write_bytes(b'no image')
    changes = {'test_dataloader.dataset.data_prefix': dict(img=f'{tmp_path}/val/')}
    said = refused(make_runner, changes, tmp_path)
    assert f'the evaluation image {tmp_path}/val/000005.png cannot be read' in said
    (tmp_path / 'val' / '000005.png').unlink()
    assert '000005.png' in refused(make_runner, changes, tmp_path)


@pytest.fixture
def other_images(config_file, tmp_path):
    """Changes that let both data sets read their images from folders in which one file holds something else."""

    def make(content: bytes, split: str = 'val') -> dict:
        shutil.copytree(config_file.parent / split, tmp_path / split)
        (tmp_path / split / '000005.png').write_bytes(content)
        loader = dict(val='test_dataloader', train='train_dataloader')[split]
        return {f'{loader}.dataset.data_prefix': dict(img=f'{tmp_path}/{split}/'), 'ptq.calibration.num_images': 8}

    return make


def encoded(suffix: str, height: int = 64, width: int = 64, channels: int = 3) -> bytes:
    image = np.random.default_rng(0).integers(0, 255, (height, width, channels), dtype=np.uint8)
    return cv2.imencode(suffix, image)[1].tobytes()


@pytest.fixture
def lenient(monkeypatch):
    """Reads images as OpenCV 4 does: what is missing of them is gray."""

    def read(content, *args, **kwargs):
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        return np.full((64, 64, 3), 128, np.uint8) if image is None else image

    monkeypatch.setattr('mmcv.imfrombytes', read)


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_an_image_that_is_cut_short_is_named(make_runner, other_images, lenient, suffix, tmp_path):
    said = refused(make_runner, other_images(encoded(suffix)[:2000]), tmp_path)
    assert '/val/000005.png cannot be read: the file is damaged or cut short' in said


def test_a_calibration_image_that_is_cut_short_is_skipped(make_runner, other_images, lenient, tmp_path):
    runner = make_runner(other_images(encoded('.jpg')[:2000], 'train'))
    assert runner.calibration.skipped == [f'{tmp_path}/train/000005.png'] and len(runner.calibration) == 7


@pytest.mark.parametrize('split', ['train', 'val'])
def test_images_of_other_channels_are_named(make_runner, other_images, split, tmp_path):
    changes = other_images(encoded('.png', channels=4), split)
    config = make_runner(work_dir=tmp_path / 'other').cfg
    for loader in ('test_dataloader', 'train_dataloader'):
        pipeline = config[loader].dataset.pipeline
        pipeline[0].color_type = 'unchanged'
        changes[f'{loader}.dataset.pipeline'] = pipeline
    said = refused(make_runner, changes, tmp_path)
    assert f'/{split}/000005.png has 4 channels of uint8, and 00000' in said and '3 channels of uint8' in said


def test_an_image_that_fails_in_the_middle_is_named(make_runner, other_images, monkeypatch):
    damaged = bytearray(encoded('.png'))
    damaged[3000] ^= 1  # as whole as its head and its end tell
    runner = make_runner(other_images(bytes(damaged)))
    runner.load()
    with pytest.raises(PTQError, match='the evaluation image .*/000005.png cannot be read'):
        runner.evaluate_detector(runner.float_detector)


def test_a_detector_that_fails_in_the_middle_is_no_matter_of_images(make_runner, monkeypatch):
    runner = make_runner()
    runner.load()
    monkeypatch.setattr(runner.float_detector, 'forward', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.evaluate_detector(runner.float_detector)


def test_sizes_are_those_of_the_images_and_not_of_their_annotations(make_runner, other_images):
    runner = make_runner(other_images(encoded('.png', height=32)))
    assert image_sizes(runner.evaluation_dataset()) == {(64, 64), (32, 64)}


def test_an_image_of_which_nothing_is_left_is_named(make_runner, other_images):
    runner = make_runner(other_images(encoded('.png', height=2, width=9000)))
    with pytest.raises(PTQError, match='the evaluation image .*/000005.png cannot be read: error: OpenCV'):
        image_sizes(runner.evaluation_dataset())


MISTAKES = {
    'segm': ({'test_evaluator.metric': ['bbox', 'segm']}, "asks for 'segm', and the detector predicts boxes, no masks"),
    'metric': ({'test_evaluator.metric': 'bboxes'}, '`test_evaluator` (CocoMetric) cannot be built: KeyError'),
    'format': ({'test_evaluator.format_only': True}, '`test_evaluator` (CocoMetric) cannot be built: AssertionError'),
    'no file': ({'test_evaluator.ann_file': None}, 'ground truth is required for evaluation'),
    'evaluator': ({'test_evaluator.type': 'CoccoMetric'}, "`test_evaluator.type` is 'CoccoMetric', which is unknown."),
    'dataset': ({'test_dataloader.dataset.type': 'CocoDatset'}, "`test_dataloader.dataset.type` is 'CocoDatset'"),
    'workers': ({'test_dataloader.persistent_workers': True}, 'persistent_workers option needs num_workers > 0'),
    'loader': ({'test_dataloader.batch_siz': 2}, 'batch_siz'),
    'classes': (
        {'test_dataloader.dataset.metainfo': dict(classes='person')},
        "is the text 'person', and must be a tuple; a comma is missing: ('person',)",
    ),
    'training classes': (
        {'train_dataloader.dataset.metainfo': dict(classes='person')},
        "`train_dataloader.dataset.metainfo.classes` is the text 'person'",
    ),
    'back end': (
        {'visualizer.vis_backends': [dict(type='LocalVisBackendd')], 'visualizer.name': 'other'},
        "`visualizer.vis_backends[0].type` is 'LocalVisBackendd', which is unknown. Did you mean 'LocalVisBackend'?",
    ),
    'seed': ({'randomness.seed': -1}, '`randomness.seed` must be a whole number from 0 to 4294967295, got -1'),
    'calibration seed': ({'ptq.calibration.seed': 2**32}, '`ptq.calibration.seed` must be a whole number from 0'),
    'step': (
        {'test_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile'), True]},
        '`test_dataloader.dataset.pipeline[1]` must be a dict with a `type`, got True',
    ),
    'sampler': (
        {'test_dataloader.sampler': 'DefaultSampler'},
        '`test_dataloader.sampler` must be a dict with a `type`',
    ),
    'loop': ({'test_cfg': 'TestLoop'}, "`test_cfg` must be a dict, as dict(type='TestLoop'), got 'TestLoop'"),
    'seeds': ({'randomness': '3'}, "`randomness` must be a dict, got '3'"),
    'custom hooks': ({'custom_hooks': 5}, '`custom_hooks` must be a list of hooks, got 5'),
    # told only by the figures, which come after all images
    'items': ({'test_evaluator.metric_items': ['mAPP']}, 'metric item "mAPP" is not supported'),
    'thresholds': ({'test_evaluator.iou_thrs': 'x'}, 'fails in the detector or in `test_evaluator`'),
    'numbers': ({'test_evaluator.proposal_nums': 'x'}, 'fails in the detector or in `test_evaluator`: TypeError'),
    'no type': (
        {'visualizer.vis_backends': [dict(save_dir='x')], 'visualizer.name': 'another'},
        "a part of the config, the one with the keys 'save_dir', has no `type`; add it.",
    ),
    'hooks': ({'default_hooks': True}, '`default_hooks` must be a dict, got True'),
    'backbone': ({'model.backbone.type': 'ResNett'}, "`model.backbone.type` is 'ResNett', which is unknown."),
}


@pytest.mark.parametrize(('changes', 'told'), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_config_is_one_sentence(make_runner, tmp_path, changes, told):
    assert told in refused(make_runner, changes, tmp_path)


def test_augmentations_of_the_test_are_refused(make_runner, tmp_path, config_file):
    load, _, resize, *rest = Config.fromfile(config_file).test_dataloader.dataset.pipeline
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    augmented = [load, dict(type='TestTimeAug', transforms=[[resize], flips, rest])]
    said = refused(make_runner, {'test_dataloader.dataset.pipeline': augmented}, tmp_path)
    assert '`test_dataloader.dataset.pipeline` has TestTimeAug' in said


def test_the_rehearsal_leaves_no_trace(make_runner):
    runner = make_runner()
    runner.load()
    assert all(not metric.results for metric in runner.test_loop.evaluator.metrics)


def test_an_evaluation_without_objects_is_told_under_the_table():
    rows = [dict(model='float', metrics={'coco/bbox_mAP': -1.0}, latency_ratio=None)]
    assert any('its annotations have no objects' in line for line in closing_lines(dict(rows=rows)))
    rows[0]['metrics'] = {'coco/bbox_mAP': 0.0}
    assert not closing_lines(dict(rows=rows))


@pytest.mark.parametrize(
    ('damage', 'told'),
    [
        (None, ''),
        ('<annotation><size>', '`test_dataloader.dataset` (VOCDataset) cannot be built: ParseError'),
        ('<annotation><object><name>dog</name></object></annotation>', '(VOCDataset) cannot be built: AttributeError'),
    ],
    ids=['good', 'torn', 'without boxes'],
)
def test_annotations_of_voc_are_evaluated_or_told(damage, told, make_runner, tmp_path):
    folder = tmp_path / 'VOC2007'
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    mmcv.imwrite(np.zeros((64, 64, 3), np.uint8), str(folder / 'JPEGImages' / 'one.jpg'))
    good = (
        '<annotation><size><width>64</width><height>64</height></size><object><name>dog</name><difficult>0</difficult>'
        '<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>40</xmax><ymax>40</ymax></bndbox></object></annotation>'
    )
    (folder / 'Annotations' / 'one.xml').write_text(damage or good)
    (folder / 'ImageSets' / 'Main' / 'test.txt').write_text('one\n')
    pipeline = make_runner().cfg.test_dataloader.dataset.pipeline
    voc = dict(
        _delete_=True,
        type='VOCDataset',
        data_root=f'{tmp_path}/',
        ann_file='VOC2007/ImageSets/Main/test.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        pipeline=pipeline,
        test_mode=True,
        metainfo=dict(classes=('dog', 'cat', 'bird')),
    )
    changes = {'test_dataloader.dataset': voc, 'test_evaluator': dict(_delete_=True, type='VOCMetric', metric='mAP')}
    if told:
        assert told in refused(make_runner, changes, tmp_path)
    else:
        runner = make_runner(changes)
        runner.load()
        assert 'pascal_voc/mAP' in runner.evaluate_detector(runner.float_detector)
