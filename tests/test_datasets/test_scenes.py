from __future__ import annotations

import hashlib

import numpy as np
import pytest

from mmdet_ptq.datasets.generate import GENERATOR_VERSION
from mmdet_ptq.datasets.scenes import MAX_OBJECTS, MIN_VISIBLE, make_scene
from mmdet_ptq.datasets.shapes import CLASSES


@pytest.fixture(scope='module')
def scenes():
    return [make_scene(0, 0, index) for index in range(60)]


def test_boxes_are_tight_around_the_whole_shape_inside_the_image(scenes):
    checked = 0
    for scene in scenes:
        height, width = scene.image.shape[:2]
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        for placement, box, drawn in zip(scene.placements, scene.boxes.tolist(), scene.masks, strict=True):
            mask = placement.distance(x, y) <= 0
            rows, columns = np.nonzero(mask)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.array_equal(drawn, mask)
            checked += 1
    assert checked > 100


def test_scenes_are_varied_and_within_their_limits(scenes):
    boxes = np.concatenate([scene.boxes for scene in scenes])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
    counts = [len(scene.placements) for scene in scenes]
    assert max(counts) <= MAX_OBJECTS and len(set(counts)) >= 5
    assert sides.min() < 30 and sides.max() > 110 and sides.max() <= 162
    assert len({scene.image.shape for scene in scenes}) > 40
    assert {placement.label for scene in scenes for placement in scene.placements} == set(range(len(CLASSES)))
    visible = [share for scene in scenes for share in scene.visible]
    assert min(visible) >= MIN_VISIBLE and max(visible) == 1.0
    assert sum(share < 0.95 for share in visible) > 20  # occlusion happens


def test_hidden_objects_are_not_annotated(monkeypatch):
    from mmdet_ptq.datasets import scenes

    low = scenes.Placement(label=0, center=(100.0, 100.0), radius=20.0, angle=0.0, aspect=1.0)
    high = scenes.Placement(label=4, center=(100.0, 100.0), radius=60.0, angle=0.0, aspect=1.0)
    outside = scenes.Placement(label=0, center=(-14.0, 100.0), radius=20.0, angle=0.0, aspect=1.0)
    monkeypatch.setattr(scenes, '_place', lambda *_: [low, high, outside])
    assert make_scene(0, 0, 0).placements == [high]
    monkeypatch.setattr(scenes, '_place', lambda *_: [high, low])
    scene = make_scene(0, 0, 0)
    assert scene.placements == [high, low]
    assert scene.visible[0] < 1.0 and scene.masks[0].sum() > scene.masks[1].sum()


def test_same_seed_same_scene_other_numbers_another_one():
    first, again = make_scene(3, 1, 7), make_scene(3, 1, 7)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.boxes, again.boxes)
    for other in (make_scene(4, 1, 7), make_scene(3, 0, 7), make_scene(3, 1, 8)):
        assert other.image.shape != first.image.shape or not np.array_equal(other.image, first.image)


def test_objects_can_be_seen(scenes):
    """A shape differs from what surrounds it, on average over the scenes."""
    differences = []
    for scene in scenes:
        height, width = scene.image.shape[:2]
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        for placement, share in zip(scene.placements, scene.visible, strict=True):
            distance = placement.distance(x, y)
            inside, around = scene.image[distance <= -1], scene.image[(distance > 1) & (distance < 6)]
            if share == 1.0 and len(inside) and len(around):
                differences.append(np.abs(inside.mean(0) - around.mean(0)).max())
    assert len(differences) > 30 and np.median(differences) > 40


def test_annotations_are_those_of_this_generator_version():
    """A change here needs a new GENERATOR_VERSION, new data, and newly trained checkpoints."""
    digest = hashlib.sha256()
    for stream in range(2):
        for index in range(10):
            scene = make_scene(0, stream, index)
            digest.update(np.asarray([placement.label for placement in scene.placements], '<i8').tobytes())
            digest.update(scene.boxes.astype('<i8').tobytes())
    assert (GENERATOR_VERSION, digest.hexdigest()[:16]) == (2, '164f42fab995e2a8')
