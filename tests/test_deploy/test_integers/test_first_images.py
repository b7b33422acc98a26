"""Exact integers for the first images of an evaluation, the plain simulation from then on."""

import pytest
import torch

from mmdet_ptq.deploy import first_images_exact, integer_arithmetic, settle_biases
from mmdet_ptq.testing import raw_outputs, tiny_batch
from mmdet_ptq.testing.calibrated import predict, tiny_quantized
from mmdet_ptq.wrapping import freeze_weights


@pytest.fixture(scope='module')
def detector():
    observer = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
    found, structure = tiny_quantized('yolox', dict(preset='w8a8_observe', activations=observer, dataflow='full'))
    settle_biases(found, structure)
    freeze_weights(found)
    return found


def scores(detector):
    return torch.cat([sample.pred_instances.scores for sample in predict(detector, tiny_batch(2))])


@torch.no_grad()
def test_the_batch_after_the_last_of_them_is_plain(detector):
    plain = scores(detector)
    with integer_arithmetic(detector):
        exact = scores(detector)
    assert not torch.equal(plain, exact)
    with first_images_exact(detector, 3):
        found = [scores(detector) for _ in range(3)]
    assert [torch.equal(a, b) for a, b in zip(found, (exact, exact, plain), strict=True)] == [True] * 3
    assert torch.equal(scores(detector), plain)


@torch.no_grad()
def test_passes_without_names_of_arguments_count_too(detector):
    plain = raw_outputs(detector)
    with first_images_exact(detector, 1):
        first, second = raw_outputs(detector), raw_outputs(detector)
    assert any(not torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, plain, strict=True))


@torch.no_grad()
def test_an_error_leaves_the_plain_simulation(detector):
    plain = scores(detector)
    with pytest.raises(KeyError), first_images_exact(detector):
        scores(detector)
        raise KeyError
    assert torch.equal(scores(detector), plain)
