"""Annotation files: what is wrong is named with its id; what reading images does not need is not asked for."""

import copy
import json
import math

import pytest

from mmdet_ptq.calibration import CalibrationDataset, source_datasets
from mmdet_ptq.calibration.annotations import TO_EVALUATE, TO_LOAD, check_annotation_file, check_annotations, complete
from mmdet_ptq.config import CalibrationConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_config

GOOD = dict(
    images=[dict(id=1, file_name='a.png', width=8, height=8), dict(id=2, file_name='b.png', width=8, height=8)],
    annotations=[dict(id=i, image_id=1, category_id=1, bbox=[0, 0, 4, 4], area=16, iscrowd=0) for i in range(7, 9)],
    categories=[dict(id=1, name='red')],
)


def _without(part, field):
    return lambda content: content[part][-1].pop(field)


def _with(part, **fields):
    return lambda content: content[part][-1].update(fields)


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (lambda content: content.pop('categories'), 'has no list `categories`; is it in the format of COCO'),
        (lambda content: content.update(images={}), 'has no list `images`'),
        (lambda content: content['annotations'].append(3), r'`annotations\[2\]` is no dict'),
        (_without('images', 'id'), r'`images\[1\]` has no `id`'),
        (_without('images', 'file_name'), '`images` with the id 2 has no `file_name`'),
        (_without('images', 'width'), '`images` with the id 2 has no `width`'),
        (_without('annotations', 'bbox'), '`annotations` with the id 8 has no `bbox`'),
        (_without('annotations', 'area'), '`annotations` with the id 8 has no `area`'),
        (_without('annotations', 'iscrowd'), '`annotations` with the id 8 has no `iscrowd`'),
        (
            lambda content: content['images'][1].update(file_name=None, coco_url='http://x/1.jpg'),
            "'LVISV1Dataset' reads",
        ),
        (_with('annotations', iscrowd='no'), "with the id 8 has the `iscrowd` 'no', which is neither 0 nor 1"),
        (_with('images', id=[2]), r'`images` with the id \[2\] has an `id` that is no number and no text'),
        (_with('annotations', id=7), '`annotations` with the id 7 is there twice'),
        (_with('images', id=1), '`images` with the id 1 is there twice'),
        (_with('annotations', bbox=[0, math.nan, 1, 1]), r'id 8 has the `bbox` \[0, nan, 1, 1\], which is not four'),
        (_with('annotations', bbox=[0, 1, 1]), 'which is not four finite numbers'),
        (_with('annotations', bbox=['0', 1, 1, 1]), 'which is not four finite numbers'),
        (_with('annotations', bbox=[0, 1, 1, 10**400]), 'which is not four finite numbers'),
        (_with('annotations', area='16'), "id 8 has the `area` '16', which is no finite number"),
        (_with('images', width=math.inf), 'id 2 has the `width` inf, which is no finite number'),
        (_with('images', file_name=5), 'id 2 has the `file_name` 5, which is no text'),
    ],
)
def test_what_an_evaluation_misses_is_named(tmp_path, change, told):
    content = copy.deepcopy(GOOD)
    change(content)
    (tmp_path / 'a.json').write_text(json.dumps(content))
    needed = {**TO_LOAD, 'annotations': TO_EVALUATE['annotations']}
    with pytest.raises(PTQError, match=f"^`key`: the annotation file '.*a.json'.*{told}"):
        check_annotation_file(tmp_path / 'a.json', 'key', needed)
    check_annotations(GOOD, 'it', needed)


@pytest.mark.parametrize('text', [b'{"images": [', b'', '{"images": "\u00e9"}'.encode('latin-1'), b'[1', b'[' * 200000])
def test_a_file_that_is_no_json_is_one_sentence(tmp_path, text):
    (tmp_path / 'a.json').write_bytes(text)
    with pytest.raises(PTQError, match="'.*a.json' is no valid JSON"):
        check_annotation_file(tmp_path / 'a.json', 'key', TO_LOAD)
    cfg = tiny_config('retinanet', tmp_path)
    cfg.train_dataloader.dataset.ann_file = str(tmp_path / 'a.json')
    with pytest.raises(PTQError, match="`train_dataloader.dataset`: the annotation file '.*a.json' is no valid JSON"):
        source_datasets(cfg, CalibrationConfig())


DAMAGE = {
    'no area': _without('annotations', 'area'),
    'no box': _without('annotations', 'bbox'),
    'no category': _without('annotations', 'category_id'),
    'a box that is none': _with('annotations', bbox=[0, math.nan, 1, 1]),
    'one id twice': lambda content: content['annotations'][-1].update(id=content['annotations'][0]['id']),
    'an area that is no number': _with('annotations', area='16'),
    'a size that is no number': _with('images', width='64'),
    'no size': lambda content: [image.pop('width') for image in content['images']],
    'an id that is none': _with('annotations', id=[1], image_id=[1], category_id={}),
    'categories that are text': lambda content: content.update(categories='red'),
    'annotations that are numbers': lambda content: content.update(annotations=[1, 2]),
    'no categories': lambda content: content.pop('categories'),
    'no annotations': lambda content: content.pop('annotations'),
}


@pytest.mark.thorough
@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_calibration_asks_for_images_alone(tmp_path, damage):
    cfg = tiny_config('retinanet', tmp_path)
    path = tmp_path / 'annotations' / 'instances_train.json'
    whole = CalibrationDataset(source_datasets(cfg, CalibrationConfig()), 8, 0)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    drawn = CalibrationDataset(source_datasets(cfg, CalibrationConfig()), 8, 0)
    assert drawn.ids == whole.ids and type(drawn.datasets[0]).__name__ == 'CocoDataset'


def test_what_calibration_needs_is_asked_for(tmp_path):
    content = copy.deepcopy(GOOD)
    before = copy.deepcopy(content)
    complete(content, 'it')
    assert content == before
    content['images'][1].pop('file_name')
    with pytest.raises(PTQError, match='it: `images` with the id 2 has no `file_name`'):
        complete(content, 'it')
    cfg = tiny_config('retinanet', tmp_path)
    path = tmp_path / 'annotations' / 'instances_train.json'
    content = json.loads(path.read_text())
    content['annotations'][0].pop('area')
    path.write_text(json.dumps(content))
    with pytest.raises(PTQError, match='`train_dataloader.dataset.ann_file`.* with the id 1 has no `area`'):
        source_datasets(cfg, CalibrationConfig(), annotated=True)


def test_a_byte_order_mark_is_told_with_its_cure(tmp_path):
    cfg = tiny_config('retinanet', tmp_path)
    path = tmp_path / 'annotations' / 'instances_train.json'
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    cure = 'Save it as UTF-8 without a byte order mark'
    with pytest.raises(PTQError, match=cure):
        check_annotation_file(path, 'train_dataloader.dataset.ann_file', TO_LOAD)
    with pytest.raises(PTQError, match=f'`train_dataloader.dataset`: the annotation file .*{cure}'):
        source_datasets(cfg, CalibrationConfig(num_images=3, batch_size=1))
