"""Detectors with queries in runtimes: transformers whose shapes depend on tensors, masks of padding, several layers."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import architectures
import numpy as np
import pytest
import torch

from mmdet_ptq.deploy import get_runtime, open_model, settle_biases, with_runtime
from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic
from mmdet_ptq.deploy.network.canvas import pad_to
from mmdet_ptq.deploy.network.parts import FIRST
from mmdet_ptq.deploy.network.queries import whole_images
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.deploy.openvino.layer_inputs import openvino_choices
from mmdet_ptq.predictions.queries import chooses_queries, chosen_queries
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
# the encoder's choice of queries adds nothing to how the network is read, but half a minute
KINDS = ('deformable_detr', 'mask2former', pytest.param('two_stage_detr', marks=pytest.mark.slow))
GIVEN = dict(onnxruntime=integer_arithmetic, openvino=only_read_tensors)


@pytest.fixture(scope='module')
def known():
    with pytest.MonkeyPatch.context() as monkeypatch:
        architectures.register(monkeypatch)
        yield


@pytest.fixture(scope='module', params=KINDS)
def detector(request, known):
    detector, structure = tiny_quantized(request.param, dict(OBSERVE, dataflow='balanced'))
    settle_biases(detector, structure)
    detector.kind = request.param
    return detector


@pytest.fixture(scope='module', params=['onnxruntime', 'openvino'])
def exported(request, detector, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, get_runtime(request.param).export(copy.deepcopy(detector), folder, (1, 3, 64, 64))


@pytest.mark.thorough
def test_the_network_gives_what_the_last_layer_finds(detector):
    data = detector.data_preprocessor(tiny_batch(1, seed=3), False)
    with torch.no_grad():
        found = RawOutputs(detector, FIRST)(data['inputs'])
        layers = detector(data['inputs'], whole_images(detector, data['inputs']), mode='tensor')
    assert len(found) == 2
    assert all(torch.equal(ours, theirs[-1]) for ours, theirs in zip(found, layers, strict=True))


@pytest.mark.thorough
def test_a_runtime_computes_what_was_simulated(exported, detector):
    runtime, path = exported
    model = open_model(path, threads=1)
    coverage = model.whole_coverage()
    assert len(coverage.integer) > len(coverage.float)
    # shapes alone tell what it takes
    assert model.sized
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    # of scores that are nearly the same either may be the higher: what is not exact goes on with the runtime's choice
    given = runtime == 'openvino' and chooses_queries(detector)
    chosen = chosen_queries(detector, openvino_choices(path, image), []) if given else nullcontext()
    with torch.no_grad(), GIVEN[runtime](detector), chosen:
        simulated = [out.numpy() for out in RawOutputs(detector, FIRST)(image)]
    for ours, theirs in zip(simulated, model(image.numpy()), strict=True):
        # a code on a boundary may fall to the other side; then queries may be chosen in another order
        difference = np.abs(np.sort(ours, 1) - np.sort(theirs, 1))
        assert difference.mean() <= 0.05 * ours.std()


@pytest.mark.thorough
def test_mmdet_finds_the_same_around_a_runtime(exported, detector):
    runtime, path = exported
    around = with_runtime(tiny_detector(detector.kind, seed=5), open_model(path, threads=1))
    with GIVEN[runtime](detector):
        expected = predict(detector, tiny_batch(2, seed=4))
    for ours, theirs in zip(expected, predict(around, tiny_batch(2, seed=4)), strict=True):
        ours, theirs = ours.pred_instances, theirs.pred_instances
        assert len(ours) == len(theirs) > 0
        atol = 0.05 if runtime == 'onnxruntime' else 0.1  # there single codes differ
        torch.testing.assert_close(theirs.scores, ours.scores, atol=atol, rtol=0)


@pytest.mark.thorough
def test_what_is_padded_counts_as_image_in_float_too(detector, known):
    """The runtime's network reads no mask: a padded detector must do the same, and map boxes and masks back."""
    batch = architectures.sized_batch(40, 56, num_images=1)
    alone, padded = tiny_detector(detector.kind), tiny_detector(detector.kind)
    pad_to(padded, (64, 64))
    pad_to(padded, (64, 64))
    (ours,) = predict(padded, batch)
    data = padded.data_preprocessor(copy.deepcopy(batch), False)
    assert data['inputs'].shape[2:] == (64, 64)
    with torch.no_grad():
        network = RawOutputs(padded, FIRST)(data['inputs'])
        layers = _seen(padded, batch)
    # the head of a prediction gives what the network gives
    assert all(torch.equal(a, b[-1]) for a, b in zip(network, layers, strict=True))
    if 'masks' in ours.pred_instances:
        assert ours.pred_instances.masks.shape[1:] == (40, 56)
    else:
        # boxes are shares of the canvas
        (theirs,) = predict(alone, batch)
        assert ours.pred_instances.bboxes.max() > 56 >= theirs.pred_instances.bboxes.max()


def _seen(detector, batch) -> tuple:
    """What the head of a detector returned while it predicted."""
    head = getattr(detector, 'bbox_head', None) or detector.panoptic_head
    seen = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    predict(detector, batch)
    handle.remove()
    return seen[-1]
