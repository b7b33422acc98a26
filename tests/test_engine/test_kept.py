"""What detectors find on the evaluation images is kept, and compared for the page."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector

from mmdet_ptq import load_quantized
from mmdet_ptq.engine.kept import FOLDER, kept_detections, truths_of
from mmdet_ptq.engine.stages.measure import compared, report


def test_the_detections_of_a_row_are_those_of_its_detector(finished, config_file):
    kept = kept_detections(finished.work_dir, 'float')
    dataset = finished.evaluation_dataset()
    assert list(kept) == [dataset.get_data_info(index)['img_id'] for index in range(len(dataset))]
    info = dataset.get_data_info(0)
    detector = copy.deepcopy(finished.float_detector)
    detector.cfg = finished.cfg
    found = inference_detector(detector, info['img_path']).pred_instances
    ours = kept[info['img_id']]
    assert len(ours) == len(found) > 0 and (np.diff(ours.scores) <= 0).all()
    torch.testing.assert_close(torch.from_numpy(ours.boxes), found.bboxes, atol=1e-2, rtol=1e-3)
    assert kept_detections(finished.work_dir, 'simulated').keys() == kept.keys()
    assert kept_detections(finished.work_dir, 'onnxruntime') is None


def test_a_damaged_file_is_left_out(finished_copy):
    path = finished_copy / FOLDER / 'float.pth'
    path.write_bytes(path.read_bytes()[:-100])
    assert kept_detections(finished_copy, 'float') is None


def test_the_annotations_are_the_data_sets(finished, config_file):
    told = json.loads((config_file.parent / 'annotations' / 'instances_val.json').read_text())
    truths = truths_of(finished.evaluation_dataset())
    assert sum(len(truth.labels) for truth in truths.values()) == len(told['annotations'])
    x, y, width, height = told['annotations'][0]['bbox']
    truth = truths[told['annotations'][0]['image_id']]
    assert truth.boxes[0].tolist() == pytest.approx([x, y, x + width, y + height])
    assert truths_of(object()) == {}


def test_a_run_tells_what_changed(finished):
    results = json.loads((Path(finished.work_dir) / 'results.json').read_text())
    comparison = results['comparison']
    assert comparison['model'] == 'simulated' and comparison['images'] == 8 and comparison['interval'] is None
    assert {change['name'] for change in comparison['classes']} == {'red', 'green', 'blue'}
    page = (Path(finished.work_dir) / 'report.html').read_text()
    for heading in ('By class', 'Lost and invented objects', 'Scores', 'By size'):
        assert f'<h2>{heading}</h2>' in page
    assert 'inf dB' not in page
    pictures = compared(finished)
    changed = comparison['changed'][:5]
    assert [f'{c["lost"]} lost, {c["invented"]} invented' in told for c, told in zip(changed, pictures, strict=True)]
    for pair in pictures.values():
        assert pair.image.shape[2] == 3 and pair.image.dtype == np.uint8


def test_a_checkpoint_rebuilt_from_codes_still_shows_float_weights(finished):
    from mmdet_ptq.analysis.weight_grids import weight_grids

    rebuilt = load_quantized(f'{finished.work_dir}/quantized.pth')
    shown = weight_grids(rebuilt, finished.structure, float_detector=finished.float_detector)
    assert all(5 < grid.sqnr_db < 80 for grid in shown)
    assert all(grid.sqnr_db > 100 for grid in weight_grids(rebuilt, finished.structure))


def test_a_data_set_that_cannot_be_compared_costs_no_results(finished, tmp_path, monkeypatch):
    """Of any design: the page is written without the comparison, and the log says why."""
    said, drawn = [], []
    measure = 'mmdet_ptq.engine.stages.measure'
    monkeypatch.setattr(f'{measure}.build_report', lambda *args: drawn.append(args[-1]))
    monkeypatch.setattr(f'{measure}.print_log', lambda text, *_, **__: said.append(text))
    monkeypatch.setattr(finished, 'write_results', lambda: None)
    monkeypatch.setattr(f'{measure}.truths_of', lambda dataset: 1 / 0)
    report(finished)
    assert drawn == [None] and 'cannot be compared (ZeroDivisionError: division by zero' in said[0]
    monkeypatch.setattr(f'{measure}.truths_of', lambda dataset: {})
    report(finished)
    assert drawn == [None, None] and not any('cannot' in text for text in said[2:])
