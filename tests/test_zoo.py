"""Real detectors on real images: everything in integers, and close to float on the same images."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmdet_ptq.cli import load_config
from mmdet_ptq.engine import PTQRunner

IMAGES = 80


def _first_images(annotations: str, path: Path) -> str:
    """Writes the annotations of the first images alone: the evaluator counts every image of its file."""
    coco = json.loads(Path(annotations).read_text())
    coco['images'] = coco['images'][:IMAGES]
    kept = {image['id'] for image in coco['images']}
    coco['annotations'] = [box for box in coco['annotations'] if box['image_id'] in kept]
    path.write_text(json.dumps(coco))
    return str(path)


@pytest.fixture
def quantized_row(zoo, tmp_path, monkeypatch):
    """Quantizes a config of the zoo from observers alone; returns its results."""
    monkeypatch.syspath_prepend(str(zoo))
    monkeypatch.setattr('mmdet_ptq.engine.runner.build_report', lambda *args: None)

    def run(name: str, num_images: int) -> dict:
        cfg = load_config(str(zoo / 'configs' / f'{name}.py'))
        subset = _first_images(cfg.test_evaluator.ann_file, tmp_path / 'subset.json')
        cfg.merge_from_dict({
            'ptq': dict(preset='w8a8_observe', calibration=dict(num_images=num_images, batch_size=4)),
            'test_dataloader.dataset.ann_file': subset, 'test_evaluator.ann_file': subset,
            'test_dataloader.num_workers': 0,
            'test_dataloader.persistent_workers': False})
        cfg.work_dir = str(tmp_path)
        return PTQRunner.from_cfg(cfg).run()

    return run


# Few images make AP jump when one box changes places (SSDLite on 24 images, 16 for calibration: 2.2 points, on all
# of them 0.4). The bounds refuse a collapse; the committed figures on all images are the measurement.
@pytest.mark.slow
@pytest.mark.parametrize('name, num_images, float_at_least, points', [
    ('ssdlite_mbv2_person', 48, 0.1, 2.0),
    ('retinanet_r18_bccd', 8, 0.3, 2.0),
    # plain per-tensor 8-bit loses 8 points and more here, through one tensor alone
    ('yolox_nano_coco', 16, 0.2, 5.0),
])
def test_eight_bits_from_observers_stay_close_to_float(quantized_row, name, num_images, float_at_least, points):
    results = quantized_row(name, num_images)
    assert results['coverage']['integer_mac_share'] == 1.0
    assert results['calibration']['num_images'] == num_images
    before, after = (row['metrics']['coco/bbox_mAP'] for row in results['rows'])
    assert before >= float_at_least
    assert abs(before - after) * 100 <= points
