"""Layers that are left float, and activations of 16 bits, in runtimes: neither may become something else there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmdet_ptq.deploy import get_runtime, integer_arithmetic, open_model, settle_biases
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.testing import tiny_batch, tiny_quantized
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
SYMMETRIC = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'), quantizer=dict(symmetric=True))
FLOAT, COARSE, WIDE = 'backbone.layer1.0.conv1', 'backbone.layer1.1.conv1', 'backbone.layer2.0.conv2'
DEPTHWISE = 'backbone.layer2.0.depthwise_conv.conv'


@pytest.fixture(scope='module')
def detector():
    detector, structure = tiny_quantized(
        'retinanet',
        dict(
            preset='w8a8_observe',
            dataflow='full',
            activations=SYMMETRIC,
            overrides={FLOAT: 'float', COARSE: dict(weights=dict(bits=16)), WIDE: dict(activations=dict(bits=16))},
        ),
    )
    settle_biases(detector, structure)
    return detector


@pytest.fixture(scope='module')
def image(detector):
    return detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']


@torch.no_grad()
def outputs(detector, image):
    return [out.numpy() for out in RawOutputs(detector)(image)]


@pytest.mark.thorough
def test_onnxruntime_keeps_float_weights_and_wide_codes(detector, image, tmp_path):
    model = open_model(get_runtime('onnxruntime').export(detector, tmp_path, tuple(image.shape)), threads=1)
    with integer_arithmetic(detector):
        expected = outputs(detector, image)
    for ours, theirs in zip(expected, model(image.numpy()), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-5 * ours.std())
    assert {FLOAT, COARSE, WIDE} <= set(model.coverage().float)


@pytest.mark.thorough
def test_openvino_clips_wide_activations_and_computes_in_float(detector, image, tmp_path, monkeypatch):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    model = open_model(get_runtime('openvino').export(detector, tmp_path, tuple(image.shape)), threads=1)
    quantizer = detector.ptq.activations[WIDE.replace('.', '/')]
    low, high = ((code - quantizer.zero_point) * quantizer.positive_scale().detach() for code in quantizer.code_range)
    monkeypatch.setattr(quantizer, 'forward', lambda x, rounding=None: x.clamp(low, high))
    with only_read_tensors(detector):
        expected = outputs(detector, image)
    for ours, theirs in zip(expected, model(image.numpy()), strict=True):
        # a code on a boundary may fall to either side
        assert np.abs(ours - theirs).mean() <= 0.001 * ours.std()
    assert {FLOAT, COARSE, WIDE} <= set(model.coverage().float)


@pytest.mark.parametrize(
    'kind, name, options',
    [
        ('retinanet', WIDE, {}),
        ('ssd', DEPTHWISE, dict(depthwise_per_channel=True)),
        ('ssd', DEPTHWISE, dict(depthwise_per_channel=True, quantizer=dict(symmetric=False, narrow_range=False))),
    ],
    ids=['per-tensor', 'per-channel', 'zero-points'],
)
def test_ncnn_clips_wide_activations_and_computes_in_float(tmp_path, monkeypatch, kind, name, options):
    pytest.importorskip('ncnn', reason="needs pip install 'mmdet-ptq[ncnn]'")
    detector, structure = tiny_quantized(
        kind,
        dict(
            preset='w8a8_observe',
            activations=dict(SYMMETRIC, quantizer=dict(symmetric=True, narrow_range=True)),
            overrides={'*': 'float', name: dict(activations=dict(options, bits=16, float=False))},
        ),
    )
    settle_biases(detector, structure)
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    model = open_model(get_runtime('ncnn').export(detector, tmp_path, tuple(image.shape)), threads=1)
    wide = detector.ptq.activations[name.replace('.', '/')]
    assert (wide.num_channels is not None) == ('depthwise_per_channel' in options)
    shape = (-1, 1, 1) if wide.num_channels else ()
    low, high = (((code - wide.zero_point) * wide.positive_scale().detach()).reshape(shape) for code in wide.code_range)
    beyond = []

    def clip(x, rounding=None):
        beyond.append(((x < low) | (x > high)).any())
        return torch.minimum(torch.maximum(x, low), high)

    monkeypatch.setattr(wide, 'forward', clip)
    with only_read_tensors(detector):
        expected = outputs(detector, image)
    assert any(beyond)  # otherwise this would not show what clips
    for ours, theirs in zip(expected, model(image.numpy()), strict=True):
        assert np.abs(ours - theirs).mean() <= 0.001 * ours.std()
