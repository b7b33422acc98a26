"""Trained detectors on real images: each tensor that ONNX Runtime quantizes is the one that is simulated."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_ptq.cli import load_config
from mmdet_ptq.deploy import export_onnx
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.engine import PTQRunner

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
ROOT = Path(__file__).resolve().parents[2]
IMAGES = 2


def check(cfg: Config, folder: Path, dataflow: str = 'per_channel') -> None:
    """Quantizes from observers alone, exports, and compares on evaluation images."""
    cfg.ptq = dict(preset='w8a8_observe', calibration=dict(num_images=16, batch_size=4), dataflow=dataflow)
    cfg.merge_from_dict({'test_dataloader.num_workers': 0, 'test_dataloader.persistent_workers': False})
    cfg.work_dir = str(folder)
    runner = PTQRunner.from_cfg(cfg)
    detector = runner.calibrate()
    model = folder / 'model.onnx'
    images = []
    for batch in runner.test_dataloader:
        images.append(detector.data_preprocessor(batch, False)['inputs'][:1])
        if len(images) == IMAGES:
            break
    export_onnx(detector, model, tuple(images[0].shape))
    for image in images:
        # A code whose value lies on a boundary to float32's last digit may fall to either side. Such a code changes
        # others behind it: each tensor is computed from the codes that the runtime computed it from.
        found = compare_codes(detector, model, image, follow=True)
        assert {entry.name.split('@')[0] for entry in found} == set(detector.ptq.activations)
        for entry in found:
            assert entry.identical >= 0.999 and entry.largest <= 1, entry
        # with the arithmetic of integer kernels no code falls to the other side, and whole passes agree
        whole = compare_codes(detector, model, image, exact=True)
        assert len(whole) == len(found)
        for entry in whole:
            assert entry.identical >= 0.999, entry


@pytest.mark.slow
def test_the_embedded_detector(tmp_path):
    check(load_config(str(ROOT / 'configs' / 'ssdlite_mbv2_ptq.py')), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ssdlite_mbv2_person', 'retinanet_r18_bccd', 'yolox_nano_coco'])
def test_detectors_of_the_zoo(zoo, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(str(zoo))
    # with SiLU, scales per channel are for the uneven ones
    check(load_config(str(zoo / 'configs' / f'{name}.py')), tmp_path, 'auto' if 'yolox' in name else 'per_channel')
