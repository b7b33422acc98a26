from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from pycocotools import mask as rle

from mmdet_ptq.datasets import generate
from mmdet_ptq.datasets.generate import SPLITS, STAMP, ensure_generated
from mmdet_ptq.errors import PTQError

FEW = dict(train=4, val=3)


def _digest(root) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


def test_two_generations_are_equal_byte_for_byte(tmp_path):
    first, second = ensure_generated(tmp_path / 'a', FEW), ensure_generated(tmp_path / 'b', FEW)
    assert _digest(first) == _digest(second)
    assert _digest(ensure_generated(tmp_path / 'c', FEW, seed=1)) != _digest(first)
    assert len(list(first.rglob('*.png'))) == 7


def test_images_do_not_depend_on_how_many_there_are(tmp_path):
    few, more = ensure_generated(tmp_path / 'few', FEW), ensure_generated(tmp_path / 'more', dict(train=5, val=4))
    few_files, more_files = _digest(few), _digest(more)
    for name in few_files:
        if name.endswith('.png'):
            assert few_files[name] == more_files[name]


def test_splits_are_disjoint_and_the_annotations_consistent(tmp_path):
    root = ensure_generated(tmp_path / 'data', FEW)
    coco = {split: json.loads((root / 'annotations' / f'instances_{split}.json').read_text()) for split in SPLITS}
    ids = {split: {image['id'] for image in coco[split]['images']} for split in SPLITS}
    assert {split: len(ids[split]) for split in SPLITS} == FEW
    assert not ids['train'] & ids['val']
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in root.rglob('*.png')]
    assert len(set(digests)) == sum(FEW.values())
    for split in SPLITS:
        sizes = {image['id']: (image['width'], image['height']) for image in coco[split]['images']}
        assert coco[split]['annotations']
        annotation_ids = [annotation['id'] for annotation in coco[split]['annotations']]
        assert len(set(annotation_ids)) == len(annotation_ids)
        for annotation in coco[split]['annotations']:
            x, y, width, height = annotation['bbox']
            assert x >= 0 and y >= 0 and width > 0 and height > 0
            assert x + width <= sizes[annotation['image_id']][0] and y + height <= sizes[annotation['image_id']][1]
            assert 0 < annotation['area'] <= width * height
            assert annotation['area'] == rle.area(annotation['segmentation'])
            assert list(rle.toBbox(annotation['segmentation'])) == annotation['bbox']


def test_second_call_generates_nothing(tmp_path, monkeypatch):
    root = ensure_generated(tmp_path / 'data', FEW)
    monkeypatch.setattr(generate, 'make_scene', None)
    assert ensure_generated(root, FEW) == root


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch, error):
    def interrupted(seed, stream, index):
        if index == 2:
            raise error
        return make_scene(seed, stream, index)

    make_scene = generate.make_scene
    monkeypatch.setattr(generate, 'make_scene', interrupted)
    with pytest.raises(error):
        ensure_generated(tmp_path / 'data', FEW)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(list(ensure_generated(tmp_path / 'data', FEW).rglob('*.png'))) == 7


def test_killed_generation_is_not_taken_for_complete(tmp_path):
    finished = ensure_generated(tmp_path / 'data', FEW)
    (finished / STAMP).unlink()  # a folder without a stamp is nobody's, and is not overwritten either
    with pytest.raises(PTQError, match='not the embedded data set'):
        ensure_generated(finished, FEW)


def test_other_version_is_generated_anew(tmp_path, monkeypatch):
    root = ensure_generated(tmp_path / 'data', FEW)
    before = (root / STAMP).read_text()
    monkeypatch.setattr(generate, 'GENERATOR_VERSION', generate.GENERATOR_VERSION + 1)
    (root / 'train' / '000000.png').write_bytes(b'old')
    ensure_generated(root, FEW)
    assert (root / STAMP).read_text() != before
    assert (root / 'train' / '000000.png').read_bytes() != b'old'
    assert [path.name for path in tmp_path.iterdir()] == ['data']


def test_several_processes_may_generate_at_once(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        roots = list(pool.map(lambda _: ensure_generated(tmp_path / 'data', FEW), range(3)))
    assert len(list(roots[0].rglob('*.png'))) == 7
    assert [path.name for path in tmp_path.iterdir()] == ['data']


def test_foreign_data_are_left_alone(tmp_path):
    (tmp_path / 'coco').mkdir()
    (tmp_path / 'coco' / 'precious.txt').write_text('mine')
    with pytest.raises(PTQError, match='data_root'):
        ensure_generated(tmp_path / 'coco', FEW)
    assert (tmp_path / 'coco' / 'precious.txt').read_text() == 'mine'


@pytest.mark.parametrize('num_images', [dict(train=3), dict(train=0, val=1), dict(train=1, val=1, test=1)])
def test_wrong_num_images_are_refused(tmp_path, num_images):
    with pytest.raises(PTQError, match='num_images'):
        ensure_generated(tmp_path / 'data', num_images)


def test_full_disk_is_told(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(generate, '_write', no_space)
    with pytest.raises(PTQError, match='No space left'):
        ensure_generated(tmp_path / 'data', FEW)
    assert list(tmp_path.iterdir()) == []
