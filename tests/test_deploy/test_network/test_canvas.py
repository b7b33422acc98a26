import copy

import pytest
import torch
from mmengine.structures import InstanceData

from mmdet_ptq.deploy.network.canvas import canvas_of, check_canvas, pad_to
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_batch, tiny_detector


@pytest.fixture(scope='module')
def detector():
    return tiny_detector('retinanet')


def batch(*sizes):
    found = {key: value[: len(sizes)] for key, value in tiny_batch(2).items()}
    found['inputs'] = [image[:, :height, :width] for image, (height, width) in zip(found['inputs'], sizes, strict=True)]
    for sample, size in zip(found['data_samples'], sizes, strict=True):
        sample.set_metainfo(dict(img_shape=size, ori_shape=size))
    return found


def test_it_holds_all_images_in_multiples_of_the_divisor(detector):
    assert canvas_of(detector, [(40, 64), (64, 33)]) == (64, 64)
    assert canvas_of(detector, [(33, 20), (10, 65)]) == (64, 96)


def test_padding_is_that_of_a_batch_with_a_larger_image(detector):
    together = detector.data_preprocessor(batch((40, 33), (64, 64)), False)
    padded = copy.deepcopy(detector)
    pad_to(padded, (32, 32))
    pad_to(padded, (64, 64))  # the last one holds
    alone = padded.data_preprocessor(batch((40, 33)), False)
    assert torch.equal(alone['inputs'], together['inputs'][:1])
    assert alone['data_samples'][0].batch_input_shape == (64, 64)
    with torch.no_grad():
        expected, found = (d(**data, mode='predict')[0] for d, data in ((detector, together), (padded, alone)))
    ours, theirs = (sample.pred_instances for sample in (found, expected))
    assert isinstance(ours, InstanceData) and len(ours) == len(theirs) > 0
    torch.testing.assert_close(ours.bboxes, theirs.bboxes, atol=1e-3, rtol=1e-4)


def test_larger_images_stay(detector):
    padded = copy.deepcopy(detector)
    pad_to(padded, (32, 96))
    assert padded.data_preprocessor(batch((64, 64)), False)['inputs'].shape[-2:] == (64, 96)


def test_a_canvas_that_does_not_hold_an_image_is_refused():
    check_canvas((64, 96), [(64, 96), (32, 33)])
    with pytest.raises(PTQError, match=r'`ptq.export_size` is 64x96 .* image of 96x64'):
        check_canvas((64, 96), [(64, 96), (96, 64)])
