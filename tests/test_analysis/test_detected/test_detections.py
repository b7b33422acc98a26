import numpy as np
import pytest
import torch

from mmdet_ptq.analysis.detected.detections import Detections, detect_both, match, shown_image


def detections(*rows):
    rows = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(int))


def test_match_wants_the_same_class_and_half_the_area():
    before = detections((0, 0, 10, 10, 0.9, 0), (20, 20, 30, 30, 0.8, 1), (50, 50, 60, 60, 0.7, 2))
    after = detections((20, 20, 30, 30, 0.9, 2), (0, 0, 10, 8, 0.8, 0), (56, 50, 66, 60, 0.7, 2))
    assert match(before, after) == [(0, 1, pytest.approx(0.8))]


def test_match_gives_each_detection_once():
    before = detections((0, 0, 10, 10, 0.5, 0), (0, 0, 10, 9, 0.9, 0))
    after = detections((0, 0, 10, 10, 0.6, 0))
    assert match(before, after) == [(1, 0, pytest.approx(0.9))]
    assert match(detections(), after) == match(after, detections()) == []


def test_detect_both(tiny, batch):
    batches = [batch(3), batch(4)]
    pairs = list(detect_both(tiny.original, tiny.detector, batches, 3))
    assert len(pairs) == 3
    # (3, H, W) blue first becomes (H, W, 3) red first
    assert (pairs[2].image[..., 0] == batches[1]['inputs'][0][2].numpy()).all()
    assert pairs[0].image.shape == (60, 90, 3)
    assert len(batches[1]['inputs']) == 2, 'the caller keeps its batch'
    boxes = np.concatenate([pair.before.boxes for pair in pairs])
    # original images are twice as large, the picture shows the network's input
    assert len(boxes) and boxes[:, [0, 2]].max() <= 90 and boxes[:, [1, 3]].max() <= 60
    for pair in pairs:
        assert (np.diff(pair.after.scores) <= 0).all()


def test_padding_of_the_pipeline_is_not_shown(tiny, batch):
    padded = batch(3)
    for sample in padded['data_samples']:
        sample.set_metainfo(dict(ori_shape=(80, 100)))
    (pair,) = detect_both(tiny.original, tiny.detector, [padded], 1)
    assert pair.image.shape == (40, 50, 3)


def test_images_of_16_bits_are_shown_as_bright_as_they_are():
    image = torch.tensor([0, 6553, 32767, 65535]).to(torch.uint16).expand(3, 4, 4)
    shown = shown_image(image, {})
    assert shown.dtype == np.uint8 and shown[0, :, 0].tolist() == [0, 25, 127, 255]
    assert (shown_image(torch.full((1, 2, 2), 9, dtype=torch.uint8), {}) == 9).all()
