"""Quantized tiny detectors have the ranges of their one batch; what tests compare is mmdet's own output."""

from __future__ import annotations

import copy

import pytest
import torch

from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing.calibrated import OBSERVE, predict, raw_outputs, tiny_quantized
from mmdet_ptq.testing.data import tiny_batch
from mmdet_ptq.testing.detectors import tiny_detector
from mmdet_ptq.wrapping import quantization_mode, quantized_weights


@pytest.fixture(scope='module')
def retinanet():
    return tiny_detector('retinanet')


@pytest.fixture(scope='module')
def quantized():
    return tiny_quantized('retinanet')


def same(first, second) -> bool:
    return len(first) == len(second) > 0 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_raw_outputs_are_those_of_mmdet_in_order(retinanet):
    images = torch.stack(tiny_batch(2)['inputs']).float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    with torch.no_grad():
        # blue first on disk, red first in the network
        scores, boxes = retinanet.bbox_head(retinanet.extract_feat((images.flip(1) - mean) / std))
    found = raw_outputs(retinanet)
    assert same(found, [*scores, *boxes])
    assert not any(tensor.requires_grad for tensor in found)


def test_a_given_batch_is_used_and_not_changed(retinanet):
    batch = tiny_batch(1, seed=7)
    before = copy.deepcopy(batch)
    found = raw_outputs(retinanet, batch)
    assert all(tensor.shape[0] == 1 for tensor in found)
    predicted = predict(retinanet, batch)
    assert len(predicted) == 1
    assert same(batch['inputs'], before['inputs']) and batch['inputs'][0].dtype == torch.uint8
    sample, untouched = batch['data_samples'][0], before['data_samples'][0]
    assert sample.metainfo == untouched.metainfo and sample.keys() == untouched.keys() == []


def test_predictions_are_those_of_mmdets_test_step(retinanet):
    expected = retinanet.test_step(tiny_batch(2))
    found = predict(retinanet, tiny_batch(2))
    for ours, theirs in zip(found, expected, strict=True):
        for key in ('bboxes', 'scores', 'labels'):
            assert same([ours.pred_instances[key]], [theirs.pred_instances[key]])


def test_ranges_are_the_ends_of_what_one_batch_brings(quantized):
    detector, structure = quantized
    image = structure.layers[0].inputs[0]
    assert structure.layers[0].name == 'backbone.conv1'
    normalized = detector.data_preprocessor(tiny_batch(2, seed=1), False)['inputs']
    quantizer = detector.ptq.activations[image]
    low, high = float(normalized.min()), float(normalized.max())
    scale = (high - low) / 255
    assert float(quantizer.positive_scale()) == pytest.approx(scale, rel=1e-3)
    # the ends are among the values, to half a step
    ends = quantizer(torch.tensor([low, high, low - 10, high + 10]))
    torch.testing.assert_close(ends, torch.tensor([low, high, low, high]), atol=0.51 * scale, rtol=0)


def test_everything_is_quantized_to_eight_bits_and_float_mode_is_the_float_detector(quantized, retinanet):
    detector, structure = quantized
    assert not detector.training and all(layer.integer for layer in structure.layers)
    assert {weight.quantizer.spec()['bits'] for weight in quantized_weights(detector).values()} == {8}
    assert {entry.spec['bits'] for entry in structure.activations.values()} == {8}
    plain = raw_outputs(retinanet)
    with quantization_mode(detector, 'float'):
        for ours, theirs in zip(raw_outputs(detector), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(raw_outputs(detector), plain, strict=True):
        noise = (ours - theirs).square().mean() / theirs.var()
        assert 1e-7 < noise < 0.1


def test_a_block_of_ones_own_and_another_seed():
    block = {**OBSERVE, 'weights': dict(bits=4)}
    detector, structure = tiny_quantized('retinanet', block, seed=1)
    assert {layer.weight['bits'] for layer in structure.layers} == {4}
    stem = tiny_detector('retinanet', seed=1).backbone
    gain = stem.bn1.weight / (stem.bn1.running_var + stem.bn1.eps).sqrt()
    folded = detector.backbone.conv1.parametrizations.weight.original
    torch.testing.assert_close(folded, stem.conv1.weight * gain.view(-1, 1, 1, 1), rtol=1e-5, atol=1e-7)
    assert block == {**OBSERVE, 'weights': dict(bits=4)}


@pytest.mark.parametrize(
    'kind, ptq, told',
    [('retina', None, "there is no tiny detector 'retina'"), ('ssd', dict(presett='w8a8'), "Did you mean 'preset'")],
)
def test_mistakes_are_told(kind, ptq, told):
    with pytest.raises(PTQError, match=told):
        tiny_quantized(kind, ptq)
