"""Codes in ONNX Runtime against those of the simulation."""

from __future__ import annotations

import architectures
import pytest
import torch

from mmdet_ptq.deploy import get_runtime, open_model
from mmdet_ptq.deploy.network.parts import parts_of
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
    # what the simulation returns behind the runtime's codes: the box head's follow from them alone
    model = open_model(path, threads=1)
    parts = parts_of(detector, image)
    theirs = [out for p in parts for out in (model.parts[p.name] if p.name else model)(*(x.numpy() for x in p.inputs))]
    for ours, runtime in zip(outputs, theirs, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(runtime), atol=2e-2 * float(ours.abs().max()), rtol=0)
