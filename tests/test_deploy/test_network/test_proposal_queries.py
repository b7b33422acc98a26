"""Detectors whose regions begin as queries that are the same for every image (Sparse R-CNN, QueryInst)."""

from __future__ import annotations

import architectures
import pytest
import torch

from mmdet_ptq.deploy import get_runtime, open_model, settle_biases, with_runtime
from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic
from mmdet_ptq.deploy.network.parts import parameters_between, parts_of
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
GIVEN = dict(onnxruntime=integer_arithmetic, openvino=only_read_tensors)
QUERIES = ['rpn_head.init_proposal_bboxes.weight', 'rpn_head.init_proposal_features.weight']


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    architectures.register(monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_mmdet_finds_the_same_boxes_and_masks_from_the_queries_of_the_file(tmp_path, runtime):
    pytest.importorskip(runtime)
    detector, structure = tiny_quantized('query_inst', dict(OBSERVE, dataflow='balanced'))
    settle_biases(detector, structure)
    path = get_runtime(runtime).export(detector, tmp_path, (1, 3, 64, 64))
    around = with_runtime(tiny_detector('query_inst', seed=5), open_model(path, threads=1))
    batch = tiny_batch(2, seed=4)
    with GIVEN[runtime](detector):
        expected = predict(detector, batch)
    for ours, theirs in zip(expected, predict(around, batch), strict=True):
        ours, theirs = ours.pred_instances, theirs.pred_instances
        assert len(ours) == len(theirs) == 10
        torch.testing.assert_close(theirs.scores.sort().values, ours.scores.sort().values, atol=1e-2, rtol=0)
        assert (ours.masks.sum((1, 2)).sort().values - theirs.masks.sum((1, 2)).sort().values).abs().max() < 100
    for name in QUERIES:
        assert torch.equal(around.get_parameter(name), detector.get_parameter(name))


def test_what_is_read_between_the_networks_is_no_layer():
    detector = tiny_detector('query_inst')
    assert parameters_between(detector) == QUERIES
    detector.rpn_head.scores = torch.nn.Linear(16, 1)
    assert parameters_between(detector) == QUERIES
    with pytest.raises(PTQError, match=r'its own code computes with rpn_head\.scores\.weight'):
        parts_of(detector, torch.zeros(1, 3, 64, 64))


@pytest.mark.thorough
def test_a_head_that_compares_regions_is_given_as_many_as_it_was_exported_for(tmp_path):
    detector = tiny_detector('query_inst')
    path = get_runtime('onnxruntime').export(detector, tmp_path, (1, 3, 64, 64))
    around = with_runtime(tiny_detector('query_inst', seed=5), open_model(path, threads=1))
    with pytest.raises(PTQError, match=r'bbox_head\.0 was exported for inputs of .* and is given'):
        around.roi_head.bbox_head[0](torch.zeros(12, 16, 5, 5), torch.zeros(1, 12, 16))
