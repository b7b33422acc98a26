"""Image files that are cut short, rotated or of another kind, as far as they tell it themselves."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from mmdet_ptq import PTQError
from mmdet_ptq.calibration.image_files import check_pixels, glance, pixels

IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def written(tmp_path):
    def write(suffix: str, left: slice = slice(None), after: bytes = b''):
        path = tmp_path / f'image{suffix}'
        path.write_bytes(cv2.imencode(suffix, IMAGE)[1].tobytes()[left] + after)
        return path

    return write


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.bmp', '.webp', '.tiff'])
def test_whole_images_are_whole(written, suffix):
    assert glance(written(suffix)).torn == ''


def test_what_cameras_append_is_no_damage(written):
    assert glance(written('.jpg', after=b'the model of the camera' * 9)).torn == ''


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_images_that_are_cut_short_are_told(written, suffix):
    told = glance(written(suffix, slice(None, 2000))).torn
    assert told.startswith('the file is damaged or cut short (image file is truncated')
    assert glance(written('.jpg', slice(None, -2))).torn  # the mark of its end


def test_no_image_is_decoded_that_is_whole(written, monkeypatch):
    paths = [written('.jpg'), written('.png')]
    monkeypatch.setattr(Image.Image, 'load', lambda self: pytest.fail('decoded'))
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', lambda self: pytest.fail('decoded'))
    assert all(glance(path).torn == '' for path in paths)


@pytest.mark.parametrize('content', [b'', b'no image'])
def test_what_is_no_image_is_left_to_the_pipeline(tmp_path, content):
    (tmp_path / 'image.png').write_bytes(content)
    assert glance(tmp_path / 'image.png') is None and glance(tmp_path) is None and glance(tmp_path / 'absent') is None


def test_rotated_images_are_of_another_kind(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    for suffix in ('.jpg', '.png'):
        Image.fromarray(IMAGE).save(tmp_path / f'plain{suffix}')
        Image.fromarray(IMAGE).save(tmp_path / f'rotated{suffix}', exif=exif)
        assert glance(tmp_path / f'plain{suffix}').kind != glance(tmp_path / f'rotated{suffix}').kind


def test_images_of_other_channels_are_named():
    color, gray, wide = (dict(inputs=torch.zeros(n, 4, 4, dtype=kind)) for n, kind in CHANNELS)
    check_pixels(pixels(color), pixels(color), 'b.png', 'a.png')
    check_pixels(pixels(dict(inputs=[])), pixels(color), 'b.png', 'a.png')
    with pytest.raises(PTQError, match='^b.png has 1 channels of uint8, and a.png 3 channels of uint8; make the files'):
        check_pixels(pixels(gray), pixels(color), 'b.png', '/data/a.png')
    with pytest.raises(PTQError, match='3 channels of uint16'):
        check_pixels(pixels(wide), pixels(color), 'b.png', '/data/a.png')


CHANNELS = ((3, torch.uint8), (1, torch.uint8), (3, torch.uint16))
