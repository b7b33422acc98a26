"""What a generated program reads of an image is what mmdet's test pipeline and data preprocessor make of it."""

import copy
import runpy

import cv2
import numpy as np
import pytest
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope

from mmdet_ptq.deploy.network.canvas import pad_to
from mmdet_ptq.deploy.network.program import Opening, detection_program
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_detector

READ, PACK = dict(type='LoadImageFromFile'), dict(type='mmdet.PackDetInputs')
# the preprocessor pads to multiples of 32
CANVAS = 96
OPENING = Opening('json', 'model = path', 'model')
PAD = dict(img=(114.0, 114.0, 114.0))
STEPS = dict(
    ratio_kept=[dict(type='Resize', scale=(80, 48), keep_ratio=True)],
    ratio_not_kept=[dict(type='mmdet.Resize', scale=(80, 48), keep_ratio=False, interpolation='bicubic')],
    factor=[dict(type='Resize', scale_factor=1.3, keep_ratio=True, interpolation='area')],
    factors=[dict(type='mmcv.Resize', scale_factor=(1.3, 0.7))],
    nothing=[dict(type='LoadAnnotations', with_bbox=True)],
    padded=[dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='Pad', size=(80, 70), pad_val=PAD)],
    square=[dict(type='Pad', pad_to_square=True, pad_val=PAD), dict(type='Resize', scale=(40, 40), keep_ratio=True)],
    multiple=[dict(type='Resize', scale=(61, 61), keep_ratio=True), dict(type='Pad', size_divisor=16, pad_val=7)],
    square_multiple=[dict(type='Pad', pad_to_square=True, size_divisor=8, pad_val=dict(img=3))],
)


@pytest.fixture(scope='module')
def detector():
    detector = tiny_detector('retinanet')
    init_default_scope('mmdet')
    return detector


@pytest.fixture
def image(tmp_path):
    path = str(tmp_path / 'image.png')
    cv2.imwrite(path, np.random.default_rng(0).integers(0, 256, (54, 41, 3), dtype=np.uint8))
    return path


def program(tmp_path, detector, pipeline, classes=('one', "it's")):
    path = tmp_path / 'detect.py'
    path.write_text(detection_program(pipeline, detector, (1, 3, CANVAS, CANVAS), OPENING, 'model', classes))
    return runpy.run_path(str(path))


def mmdets(detector, pipeline, image):
    """The tensor, and what mmdet says of the image."""
    detector = copy.deepcopy(detector)
    pad_to(detector, (CANVAS, CANVAS))
    steps = [step for step in pipeline if step['type'] != 'LoadAnnotations']
    data = detector.data_preprocessor(pseudo_collate([Compose(steps)(dict(img_path=image, img_id=0))]), False)
    return data['inputs'].numpy(), data['data_samples'][0].metainfo


@pytest.mark.parametrize('name', STEPS)
def test_the_tensor_is_mmdets(detector, image, tmp_path, name):
    pipeline = [READ, *STEPS[name], PACK]
    made = program(tmp_path, detector, pipeline)
    ours, size, scale = made['prepare'](cv2.imread(image))
    theirs, meta = mmdets(detector, pipeline, image)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert size.tolist() == [list(meta['img_shape'])]
    assert scale == pytest.approx(meta.get('scale_factor', (1.0, 1.0)))
    assert made['CLASSES'] == ['one', "it's"]


@pytest.mark.parametrize(
    'preprocessor',
    [dict(mean=None, std=None, bgr_to_rgb=False), dict(mean=[1.5], std=[2.0], pad_value=0.5), dict(bgr_to_rgb=False)],
    ids=['plain', 'gray', 'bgr'],
)
def test_the_preprocessor_is_mmdets(preprocessor, image, tmp_path):
    gray = len(preprocessor.get('mean') or ()) == 1
    detector = tiny_detector('retinanet')
    kind = type(detector.data_preprocessor)
    common = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], pad_size_divisor=32)
    detector.data_preprocessor = kind(**{**common, **preprocessor})
    init_default_scope('mmdet')
    read = dict(READ, to_float32=True, color_type='grayscale' if gray else 'color')
    pipeline = [read, dict(type='Resize', scale=(80, 48), keep_ratio=True), PACK]
    path = tmp_path / 'detect.py'
    shape = (1, 1 if gray else 3, CANVAS, CANVAS)
    path.write_text(detection_program(pipeline, detector, shape, OPENING, 'model', ()))
    reading = cv2.IMREAD_GRAYSCALE if gray else cv2.IMREAD_COLOR
    ours, _, _ = runpy.run_path(str(path))['prepare'](cv2.imread(image, reading))
    np.testing.assert_allclose(ours, mmdets(detector, pipeline, image)[0], atol=1e-5)


def test_an_image_that_does_not_fit_is_told(detector, tmp_path):
    made = program(tmp_path, detector, [READ, dict(type='Resize', scale=(200, 64), keep_ratio=True), PACK])
    with pytest.raises(SystemExit, match=r'resized to 64x200 .*takes 96x96; .*ptq.export_size'):
        made['prepare'](np.zeros((16, 50, 3), np.uint8))


@pytest.mark.parametrize(
    ('steps', 'told'),
    [
        ([READ, dict(type='RandomFlip', prob=0.5), PACK], 'has RandomFlip, which is unknown'),
        ([READ, dict(type='os.system'), PACK], 'has os.system, which is unknown'),
        ([dict(READ, imdecode_backend='pillow'), PACK], "reads its image by 'pillow'"),
        ([dict(type='Pad', size=(8, 8)), PACK], 'reads its image by Pad'),
        ([READ, *STEPS['ratio_kept'], *STEPS['factor'], PACK], 'resizes its image more than once'),
        ([READ, dict(type='Resize', scale=(8, 8), backend='pillow'), PACK], "resizes by 'pillow'"),
        ([READ, dict(type='Resize', scale=(8.5, 8)), PACK], 'no whole numbers'),
        ([READ, dict(type='Pad', size=(8, 8), padding_mode='reflect'), PACK], "pads by 'reflect'"),
    ],
)
def test_what_a_program_does_not_know_is_named(detector, steps, told):
    with pytest.raises(PTQError, match=told):
        detection_program(steps, detector, (1, 3, CANVAS, CANVAS), OPENING, 'model', ())


def test_a_preprocessor_of_ones_own_is_named(detector):
    detector = copy.deepcopy(detector)
    detector.data_preprocessor.__class__ = type('MyPreprocessor', (type(detector.data_preprocessor),), {})
    with pytest.raises(PTQError, match='MyPreprocessor is unknown'):
        detection_program([READ, PACK], detector, (1, 3, CANVAS, CANVAS), OPENING, 'model', ())


def test_an_image_of_other_channels_is_told(detector, image, tmp_path, monkeypatch, capsys):
    read = dict(READ, color_type='unchanged')
    path = tmp_path / 'detect.py'
    path.write_text(detection_program([read, PACK], detector, (1, 4, CANVAS, CANVAS), OPENING, 'model', ()))
    monkeypatch.setattr('sys.argv', ['detect.py', image])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name='__main__')
    assert 'has the shape (54, 41, 3), and the model takes 4 channels' in capsys.readouterr().err
