"""The stages that measure: what is evaluated, with which detector, and what the results say of it."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from torch import nn

from mmdet_ptq import load_quantized
from mmdet_ptq.deploy import integer_arithmetic
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.engine.stages.measure import evaluate, evaluate_float, evaluate_part, exported_models, report
from mmdet_ptq.testing.calibrated import OBSERVE

NUMBERS = itertools.count()
PTQ = {**OBSERVE, 'calibration': dict(num_images=4, batch_size=4)}


class Evaluations:
    """Stands for the test loop: it keeps who was evaluated, and tells the figures that it is given."""

    def __init__(self, run: PTQRunner, monkeypatch) -> None:
        self.seen: list[tuple[nn.Module, str | None, tuple]] = []
        self.figures = [{'coco/bbox_mAP': value} for value in (0.5, 0.4, 0.3)]

        def evaluate_detector(detector: nn.Module, row: str | None = None) -> dict[str, float]:
            with torch.no_grad():
                image = detector.data_preprocessor(dict(inputs=[torch.zeros(3, 64, 64, dtype=torch.uint8)]), False)
            self.seen.append((detector, row, tuple(image['inputs'].shape[2:])))
            return self.figures[len(self.seen) - 1]

        monkeypatch.setattr(run, 'evaluate_detector', evaluate_detector)


@pytest.fixture(scope='module')
def build(config_file, one_thread) -> Callable[..., PTQRunner]:
    """Builds runs of the tiny config that observe ranges alone; their float detector is loaded."""

    def make(work_dir: Path, resume: bool = False) -> PTQRunner:
        DetLocalVisualizer._instance_dict.pop('visualizer', None)
        cfg = Config.fromfile(config_file)
        cfg.ptq, cfg.work_dir, cfg.resume = PTQ, str(work_dir), resume
        cfg.experiment_name = f'test_measure_{next(NUMBERS)}'
        runner = PTQRunner.from_cfg(cfg)
        runner.load()
        return runner

    return make


@pytest.fixture(scope='module')
def calibrated(build, tmp_path_factory) -> PTQRunner:
    runner = build(tmp_path_factory.mktemp('measure') / 'work_dir')
    runner.calibrate()
    return runner


@pytest.fixture
def run(calibrated) -> PTQRunner:
    """A run with its integer checkpoint, of which nothing is measured."""
    run = copy.copy(calibrated)
    run.ptq = copy.deepcopy(calibrated.ptq)
    return run


@pytest.fixture
def told(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.print_log', lambda text, *_, **__: lines.append(text))
    return lines


def written(run: PTQRunner) -> dict:
    return json.loads((Path(run.work_dir) / 'results.json').read_text())


def test_the_float_detector_is_evaluated_once_and_taken_over(build, tmp_path, monkeypatch):
    runner = build(tmp_path)
    evaluations = Evaluations(runner, monkeypatch)
    evaluate_float(runner)
    assert [(detector, row) for detector, row, _ in evaluations.seen] == [(runner.float_detector, 'float')]
    assert runner.float_figures == {'coco/bbox_mAP': 0.5}
    again = build(tmp_path, resume=True)
    monkeypatch.setattr(again, 'evaluate_detector', lambda *args: pytest.fail('it was evaluated again'))
    evaluate_float(again)
    assert again.float_figures == {'coco/bbox_mAP': 0.5}


@pytest.mark.parametrize('figures, warned', [({}, True), ({'coco/bbox_mAP': 0.0}, False)])
def test_a_detector_that_finds_nothing_is_told_before_the_calibration(run, monkeypatch, figures, warned):
    said = []
    monkeypatch.setattr('mmdet_ptq.engine.evaluation.print_log', lambda text, *_, **__: said.append(text))
    monkeypatch.setattr(run, 'evaluate_detector', lambda *args: figures)
    evaluate_float(run)
    assert any('the float detector found nothing on the evaluation images' in text for text in said) == warned


def test_rows_are_those_of_the_float_and_of_the_rebuilt_detector(run, monkeypatch):
    evaluations = Evaluations(run, monkeypatch)
    evaluate(run)
    assert [row for _, row, _ in evaluations.seen] == ['float', 'simulated']
    assert evaluations.seen[1][0] is run.detector
    results = written(run)
    assert [(row['model'], row['metrics']) for row in results['rows']] == [
        ('float', {'coco/bbox_mAP': 0.5}),
        ('simulated', {'coco/bbox_mAP': 0.4}),
    ]
    before, after = results['rows']
    # four bytes a number, whatever the file beside it takes
    floats = sum(value.numel() for value in run.float_detector.state_dict().values() if value.is_floating_point())
    assert before['size_bytes'] == 4 * floats
    assert after['size_bytes'] == (Path(run.work_dir) / 'quantized.pth').stat().st_size
    macs = sum(layer.macs for layer in run.structure.layers)
    assert before['bops'] == 32 * 32 * macs and after['bops'] == 8 * 8 * macs
    assert results['evaluation'] == dict(num_images=8) and 'canvas' not in results
    assert not {'protection', 'reconstruction'} & results.keys()


def test_the_simulated_row_computes_as_integers_do(run, monkeypatch):
    """What is evaluated gives the figures of a detector that was rebuilt from the file."""
    seen = []

    def outputs(detector: nn.Module, row: str | None = None) -> dict[str, float]:
        if row == 'simulated':
            image = torch.full((1, 3, 64, 64), 0.5)
            with torch.no_grad():
                seen.extend(detector(image, mode='tensor')[0])
        return {'coco/bbox_mAP': 0.5}

    monkeypatch.setattr(run, 'evaluate_detector', outputs)
    evaluate(run)
    rebuilt = load_quantized(f'{run.work_dir}/quantized.pth')
    with torch.no_grad(), integer_arithmetic(rebuilt):
        expected = rebuilt(torch.full((1, 3, 64, 64), 0.5), mode='tensor')[0]
    assert len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_a_canvas_has_a_float_row_of_its_own(run, monkeypatch, told):
    evaluations = Evaluations(run, monkeypatch)
    run.canvas = (96, 128)
    evaluate(run)
    assert [row for _, row, _ in evaluations.seen] == ['float', None, 'simulated']
    assert [size for *_, size in evaluations.seen][:2] == [(64, 64), (96, 128)]
    assert written(run)['canvas'] == dict(size=[96, 128], float_metrics={'coco/bbox_mAP': 0.4})
    assert told == ['coco/bbox_mAP of the float detector with padding: 0.4000 (-0.1000)']
    # the float detector itself is padded for no one else
    data = run.float_detector.data_preprocessor(dict(inputs=[torch.zeros(3, 64, 64)]), False)
    assert data['inputs'].shape[2:] == (64, 64)


def test_a_part_adds_a_row_under_its_runtimes_name(run, monkeypatch):
    evaluations = Evaluations(run, monkeypatch)
    run.float_figures, run.results = {'coco/bbox_mAP': 0.9}, dict(rows=[])
    run.ptq.export = ['openvino']
    evaluate_part(run)
    # its detections are not kept for the page, which shows one model
    assert [row for _, row, _ in evaluations.seen] == [None]
    assert [row['model'] for row in run.results['rows']] == ['simulated for openvino']


def test_models_are_listed_as_far_as_they_are_there(tmp_path):
    run = SimpleNamespace(work_dir=str(tmp_path), runtimes=['openvino', 'onnxruntime'])
    assert exported_models(run) == {}
    for name in ('onnxruntime/model.onnx', 'openvino/model.bin'):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b'model')
    assert exported_models(run) == {'onnxruntime': [tmp_path / 'onnxruntime' / 'model.onnx']}
    (tmp_path / 'openvino' / 'model.xml').write_bytes(b'model')
    found = exported_models(run)
    assert list(found) == ['openvino', 'onnxruntime']
    assert found['openvino'] == [tmp_path / 'openvino' / 'model.xml', tmp_path / 'openvino' / 'model.bin']


def test_the_report_closes_the_results_and_names_the_files(run, monkeypatch, told, capsys):
    monkeypatch.setattr('mmdet_ptq.analysis.pictures.DPI', 20)
    Evaluations(run, monkeypatch)
    evaluate(run)
    folder = Path(run.work_dir)
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    report(run)
    results = written(run)
    assert results['stages']['report']['seconds'] >= 0 and results['remarks'] and (folder / 'report.html').is_file()
    # nothing was kept of what either detector found
    assert 'comparison' not in results and told == [f'results, integer checkpoint and report are in {run.work_dir}']
    shown = ''.join(capsys.readouterr().out.split())
    # as they would be typed here
    assert 'work_dir/quantized.pth' in shown and 'more:work_dir/report.html' in shown
    assert f'{folder}/quantized.pth' not in shown
