"""Exporting a finished run again: images of any number of channels, read as the config reads them."""

import cv2
import mmcv
import numpy as np
import pytest
import torch

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import open_model, save_quantized
from mmdet_ptq.deploy.checkpoint.state import quantized_state
from mmdet_ptq.deploy.network.build import build_detector
from mmdet_ptq.deploy.network.meta import input_meta
from mmdet_ptq.engine.export_again import export_checkpoint, read_image
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, tiny_batch, tiny_config
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import prepare_detector

COLOURS = {1: 'grayscale', 3: 'color', 4: 'unchanged'}


@pytest.fixture
def config(tmp_path):
    """The config of a detector for images of some channels."""

    def make(channels, **preprocessor):
        cfg = tiny_config('retinanet', tmp_path)
        cfg.model.backbone.in_channels = channels
        cfg.model.data_preprocessor = dict(type='DetDataPreprocessor', pad_size_divisor=32, **preprocessor)
        cfg.test_dataloader.dataset.pipeline[0].color_type = COLOURS[channels]
        return cfg

    return make


def _detector(cfg):
    detector = build_detector(cfg).eval()
    detector.cfg = cfg
    return detector


def _image(path, channels, depth=np.uint8):
    image = np.random.default_rng(0).integers(0, np.iinfo(depth).max, (64, 64, channels), dtype=depth)
    assert cv2.imwrite(str(path), image)
    return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]


@pytest.mark.parametrize('channels', COLOURS)
def test_the_pipeline_of_the_config_reads_images(config, tmp_path, channels):
    expected = _image(tmp_path / 'image.png', channels)
    detector = _detector(config(channels))
    found = read_image(detector, str(tmp_path / 'image.png'), (1, channels, 64, 64))
    assert torch.equal(found, expected)
    # another size than the pipeline's is scaled to
    assert read_image(detector, str(tmp_path / 'image.png'), (1, channels, 96, 64)).shape == (1, channels, 96, 64)
    with pytest.raises(PTQError, match=f'reads {channels} channels from .*, the detector takes 2'):
        read_image(detector, str(tmp_path / 'image.png'), (1, 2, 64, 64))


def test_images_of_16_bits_and_turned_ones_are_read_as_in_the_evaluation(config, tmp_path):
    cfg = config(4)
    expected = _image(tmp_path / 'deep.png', 4, np.uint16)
    assert expected.max() > 255
    assert torch.equal(read_image(_detector(cfg), str(tmp_path / 'deep.png'), (1, 4, 64, 64)), expected)
    cfg = config(3)
    cfg.test_dataloader.dataset.pipeline[0].imdecode_backend = 'pillow'
    from PIL import Image

    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / 'turned.png', exif=exif)
    found = read_image(_detector(cfg), str(tmp_path / 'turned.png'), (1, 3, 64, 64))
    turned = mmcv.imread(str(tmp_path / 'turned.png'), backend='pillow')
    assert not np.array_equal(turned, np.asarray(image)[..., ::-1])
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), turned.astype(np.float32))


def test_what_cannot_be_read_is_one_sentence(config, tmp_path):
    detector = _detector(config(3))
    with pytest.raises(PTQError, match='--compare cannot read the image .*nothing.png.*check the path'):
        read_image(detector, str(tmp_path / 'nothing.png'), (1, 3, 64, 64))
    (tmp_path / 'text.png').write_text('no image')
    with pytest.raises(PTQError, match='--compare cannot read the image .*text.png.*through the test pipeline'):
        read_image(detector, str(tmp_path / 'text.png'), (1, 3, 64, 64))


@pytest.mark.parametrize(
    ('channels', 'expected'), [(1, dict(channels='GRAY')), (3, dict(channels='BGR')), (4, {})], ids=str
)
def test_a_model_tells_the_order_of_its_channels(config, channels, expected):
    assert input_meta(_detector(config(channels)), channels) == dict(pad_value=0, **expected)


@pytest.mark.thorough
def test_one_channel_in_another_size(config, tmp_path):
    cfg = config(1)
    detector = _detector(cfg)
    batches = [tiny_batch(2, seed) for seed in range(2)]
    for batch in batches:
        batch['inputs'] = [image[:1] for image in batch['inputs']]
    structure = prepare_detector(detector, PTQConfig.from_dict(OBSERVE), lambda: predict(detector, batches[0]))
    observe_activations(detector, batches, structure)
    state = quantized_state(detector, structure, cfg.to_dict(), {}, (1, 1, 64, 64))
    save_quantized(tmp_path / 'quantized.pth', state)
    (path,) = export_checkpoint(tmp_path / 'quantized.pth', ['openvino'], size=(96, 64))
    model = open_model(path)
    assert model.meta['input_shape'] == [1, 1, 96, 64] and model.meta['input']['channels'] == 'GRAY'
    assert model(np.zeros((1, 1, 96, 64), np.float32))
