"""The tiny COCO is a COCO, whose boxes are what is drawn; batches are as a dataloader's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from mmdet_ptq.testing.data import CLASSES, tiny_batch, tiny_coco
from mmdet_ptq.testing.models import NUM_CLASSES, SIZE


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('coco')
    tiny_coco(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotations_are_those_of_a_coco(folder, split, capsys):
    coco = COCO(folder / 'annotations' / f'instances_{split}.json')
    assert [coco.cats[i]['name'] for i in sorted(coco.cats)] == list(CLASSES) and len(CLASSES) == NUM_CLASSES
    assert len(coco.imgs) == 8 and len(coco.anns) == len(coco.dataset['annotations'])
    for image in coco.imgs.values():
        with Image.open(folder / split / image['file_name']) as picture:
            assert picture.size == (image['width'], image['height']) == (SIZE, SIZE)
        found = coco.imgToAnns[image['id']]
        assert 1 <= len(found) <= 3
        for annotation in found:
            x, y, width, height = annotation['bbox']
            assert min(x, y) >= 0 and min(width, height) > 0 and max(x + width, y + height) <= SIZE
            assert annotation['area'] == width * height and annotation['category_id'] in coco.cats


@pytest.mark.parametrize('split', ['train', 'val'])
def test_an_object_has_the_colour_of_its_class(folder, split):
    told = json.loads((folder / 'annotations' / f'instances_{split}.json').read_text())
    names = {category['id']: category['name'] for category in told['categories']}
    # of each image that one which no other can hide
    on_top = {annotation['image_id']: annotation for annotation in told['annotations']}
    for image in told['images']:
        with Image.open(folder / split / image['file_name']) as picture:
            pixels = np.array(picture.convert('RGB')).astype(int)
        x, y, width, height = on_top[image['id']]['bbox']
        inside = pixels[y : y + height, x : x + width].reshape(-1, 3)
        brightest = ('red', 'green', 'blue')[inside[0].argmax()]
        assert (inside == inside[0]).all() and brightest == names[on_top[image['id']]['category_id']]
        # nothing else is as bright: what is there to see are the objects
        others = np.ones((SIZE, SIZE), bool)
        for annotation in told['annotations']:
            if annotation['image_id'] == image['id']:
                x, y, width, height = annotation['bbox']
                others[y : y + height, x : x + width] = False
        assert pixels[others].max() < inside.max()


def test_a_seed_gives_the_same_files_and_another_one_others(folder, tmp_path):
    torch.manual_seed(3)
    np.random.seed(3)
    tiny_coco(tmp_path / 'again')
    tiny_coco(tmp_path / 'other', seed=1)
    assert contents(tmp_path / 'again') == contents(folder)
    other, first = contents(tmp_path / 'other'), contents(folder)
    assert other.keys() == first.keys() and all(other[name] != first[name] for name in first)


def test_the_splits_share_no_image(folder):
    assert not set(map(Path.read_bytes, folder.glob('train/*'))) & set(map(Path.read_bytes, folder.glob('val/*')))


def test_paths_are_returned_and_folders_made(tmp_path):
    paths = tiny_coco(str(tmp_path / 'a' / 'b'), num_images=1)
    assert set(paths) == {'train', 'val'}
    for split, path in paths.items():
        told = json.loads(Path(path).read_text())
        assert [image['file_name'] for image in told['images']] == ['000000.png']
        assert [file.name for file in (tmp_path / 'a' / 'b' / split).iterdir()] == ['000000.png']


@pytest.mark.parametrize('num_images', [0, 1, 3])
def test_a_batch_has_as_many_images_as_samples(num_images):
    batch = tiny_batch(num_images)
    assert set(batch) == {'inputs', 'data_samples'}
    assert len(batch['inputs']) == len(batch['data_samples']) == num_images
    assert all(image.shape == (3, SIZE, SIZE) and image.dtype == torch.uint8 for image in batch['inputs'])
    for number, sample in enumerate(batch['data_samples']):
        assert sample.img_id == number and sample.img_shape == sample.ori_shape == (SIZE, SIZE)
        assert sample.scale_factor == (1.0, 1.0)


def test_batches_are_drawn_from_their_seed_alone():
    state = torch.get_rng_state()
    first, again, other = tiny_batch(seed=4), tiny_batch(seed=4), tiny_batch(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first['inputs'], again['inputs'], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first['inputs'], other['inputs'], strict=True))
    assert not torch.equal(*first['inputs'])


def test_images_vary_at_scales_that_pooling_leaves():
    """Of noise alone, means over 8 x 8 pixels would be within a few grey levels of each other."""
    images = torch.stack(tiny_batch(4)['inputs']).float()
    means = torch.nn.functional.avg_pool2d(images, 8)
    assert means.std() > 40
    assert (images - means.repeat_interleave(8, 2).repeat_interleave(8, 3)).std() > 10
