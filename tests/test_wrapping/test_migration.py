import copy

import pytest
import torch

from mmdet_ptq.testing import predict, raw_outputs, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.wrapping import float_weight, prepare_detector, quantization_mode
from mmdet_ptq.config import PTQConfig

MIN_MAX = dict(type='mmdet_ptq.MinMaxObserver')


def block(strength=1.0, **more):
    return dict(preset='w8a8_observe', activations=dict(bits=4, observer=MIN_MAX, scale_migration=strength), **more)


@pytest.mark.parametrize('kind', ['yolox', 'ssd', 'faster_rcnn', 'retinanet'])
@pytest.mark.parametrize('dataflow', [None, 'auto'])
def test_the_float_detector_stays_what_it_was(kind, dataflow):
    expected = raw_outputs(tiny_detector(kind)) if kind != 'faster_rcnn' else None
    detector, structure = tiny_quantized(kind, block(dataflow=dataflow))
    assert detector.ptq.divisions
    if expected is None:
        pytest.skip('two stages')
    with quantization_mode(detector, 'float'):
        for ours, theirs in zip(raw_outputs(detector), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
