"""Detectors whose masks are drawn from prototypes of the image."""

from __future__ import annotations

import architectures
import pytest
import torch

from mmdet_ptq.deploy import get_runtime, open_model, settle_biases, with_runtime
from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
GIVEN = dict(onnxruntime=integer_arithmetic, openvino=only_read_tensors)


@pytest.mark.thorough
@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_mmdet_draws_the_same_masks_around_a_runtime(runtime, tmp_path, monkeypatch):
    pytest.importorskip(runtime)
    architectures.register(monkeypatch)
    detector, structure = tiny_quantized('yolact', dict(OBSERVE, dataflow='balanced'))
    settle_biases(detector, structure)
    model = open_model(get_runtime(runtime).export(detector, tmp_path, (1, 3, 64, 64)), threads=1)
    assert {'mask_head.protonet.0', 'bbox_head.conv_coeff'} <= {c.partition('#')[0] for c in model.coverage().integer}
    batch = tiny_batch(1, seed=4)
    with GIVEN[runtime](detector):
        (expected,) = predict(detector, batch)
    (found,) = predict(with_runtime(tiny_detector('yolact', seed=5), model), batch)
    ours, theirs = expected.pred_instances, found.pred_instances
    assert len(ours) == len(theirs) > 0 and torch.equal(ours.labels, theirs.labels)
    torch.testing.assert_close(theirs.bboxes, ours.bboxes, atol=0.5, rtol=0)
    assert (ours.masks == theirs.masks).float().mean() > 0.98
