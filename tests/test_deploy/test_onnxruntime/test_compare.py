"""Codes in ONNX Runtime against those of the simulation."""

from __future__ import annotations

import architectures
import pytest
import torch

from mmdet_ptq.deploy import get_runtime
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.testing import tiny_batch, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")


@pytest.mark.thorough
def test_a_network_without_any_code_has_nothing_to_compare(monkeypatch, tmp_path):
    architectures.register(monkeypatch)
    head = 'roi_head.mask_head'
    detector, _ = tiny_quantized('mask_rcnn', dict(OBSERVE, dataflow='balanced', overrides={f'{head}.*': 'float'}))
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    path = get_runtime('onnxruntime').export(detector, tmp_path, tuple(image.shape))
    outputs = []
    found = compare_codes(detector, path, image, follow=True, outputs=outputs)
    assert any('bbox_head' in entry.name for entry in found) and not any(head in entry.name for entry in found)
    assert min(entry.identical for entry in found) > 0.99
    # from the runtime's codes on, the box head's outputs are the same
    assert len(outputs) == 9 + 2 + 1
    for ours, theirs in outputs:
        torch.testing.assert_close(ours, theirs, atol=2e-2 * float(ours.abs().max()), rtol=0)


@pytest.mark.thorough
def test_codes_of_an_end_to_end_model_are_compared_too(tmp_path):
    detector, _ = tiny_quantized('retinanet', dict(OBSERVE, dataflow='balanced'))
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    path = get_runtime('onnxruntime').export(detector, tmp_path, tuple(image.shape), end2end=True)
    found = compare_codes(detector, path, image, follow=True)
    assert len(found) > 20 and min(entry.identical for entry in found) > 0.99
