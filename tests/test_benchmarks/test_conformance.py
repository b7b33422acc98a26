"""The conformance suite: its table and weights, its judgement, and the quick part of it for real."""

from __future__ import annotations

import csv
import subprocess

import pytest
from benchmark_tools import module, read
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.errors import PTQError

conformance = module('conformance')
WEIGHTS = sorted((conformance.FOLDER / 'weights').glob('*.pth'))
# what the table has beside the small detectors of its own
OTHERS = {
    'ssdlite_mbv2_ptq',
    'yolox_nano_coco',
    'yolox_nano_rgb_coco',
    'ssdlite_mbv2_person',
    'retinanet_r18_bccd',
    'nanodet_m_coco',
}


@pytest.fixture
def table(tmp_path):
    """Writes rows of a detector as a table; returns its path."""

    def write(detector: str, **references: str):
        path = tmp_path / 'table.csv'
        key = dict(detector=detector, part='whole', preset='w8a8_observe', metric=conformance.runs.METRIC)
        rows = [dict(key, runtime=name, reference=text, tolerance_points='0.3') for name, text in references.items()]
        conformance.write_csv(path, rows, conformance.FIELDS)
        return path

    return write


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the program with figures in place of tools/ptq.py; what a runtime has no figure for fails."""

    def main(path, figures: dict[str, float], *arguments: str) -> tuple[int, list[dict], list[list[str]]]:
        exported = []

        def run_ptq(config, preset, work_dir, options, output):
            names = next(option for option in options if option.startswith('ptq.export='))
            names = [name for name in names.partition('=')[2].strip('[]').split(',') if name]
            exported.append(names)
            if missing := [name for name in names if name not in figures]:
                output.write_text(f'Traceback\nRuntimeError: {missing[0]} broke\n\n')
                raise subprocess.CalledProcessError(1, 'ptq.py')
            wanted = ('float', 'simulated', *names)
            metric = conformance.runs.METRIC
            return [], dict(rows=[dict(model=m, metrics={metric: figures[m]}, latency_ratio=None) for m in wanted])

        monkeypatch.setattr(conformance, 'run_ptq', run_ptq)
        monkeypatch.setenv('PYTHONPATH', '')
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.chdir(tmp_path)
        work_dir = tmp_path / 'work'
        code = conformance.main(['--table', str(path), '--work-dir', str(work_dir), *arguments])
        return code, read(work_dir / 'results.csv'), exported

    return main


def test_the_table_names_detectors_that_exist():
    rows = conformance.read_table(conformance.TABLE)
    keys = [tuple(row[name] for name in conformance.KEY) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row['detector'] for row in rows} == {path.stem for path in WEIGHTS} | OTHERS
    assert {row['part'] for row in rows} == set(conformance.PARTS)
    for row in rows:
        assert tuple(row) == conformance.FIELDS
        assert 0 < float(row['tolerance_points']) <= 2
        # whatever is asked of integers is asked of the float detector, too
        assert (*(row[name] for name in conformance.KEY[:3]), 'float', row['metric']) in keys
        if row['runtime'] == 'float':
            assert 0 < float(row['reference']) < 1


def test_float_detectors_of_our_own_detect():
    rows = conformance.read_table(conformance.TABLE)
    for path in WEIGHTS:
        (row,) = conformance.select(
            rows, detector=[path.stem], part=['whole'], runtime=['float'], metric=[conformance.runs.METRIC]
        )
        assert float(row['reference']) >= 0.3


def test_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS) <= 8e6


@pytest.mark.parametrize('path', WEIGHTS, ids=lambda path: path.stem)
def test_weights_fit_their_config(path):
    init_default_scope('mmdet')
    # refuses what is missing, left over, of another shape or not finite
    load_float_checkpoint(MODELS.build(Config.fromfile(conformance.config_of(path.stem, path)).model), str(path))


def test_what_fell_is_told_and_fails(table, run, capsys):
    path = table('yolox', float='0.500', simulated='0.500', onnxruntime='0.498', openvino='0.490', ncnn='')
    figures = dict(float=0.5, simulated=0.497, onnxruntime=0.494, openvino=0.497, ncnn=0.492)
    code, results, _ = run(path, figures)
    assert code == 1
    assert {line['runtime']: line['state'] for line in results} == dict(
        float='same', simulated='same', onnxruntime='fell', openvino='rose', ncnn='no reference'
    )
    assert [line['cost_points'] for line in results] == ['0.0', '0.3', '0.6', '0.3', '0.8']
    assert all(line['processor'] and line['date'] for line in results)
    told = capsys.readouterr().out
    assert 'FELL yolox whole w8a8_observe onnxruntime coco/bbox_mAP: 0.498 to 0.494, -0.4 points' in told
    assert 'w8a8_observe in ncnn costs 0.80 points on the mean of 1' in told and 'more than 0.5: yolox 0.8' in told


def test_figures_measured_become_references(table, run):
    path = table('yolox', float='0.500', simulated='', onnxruntime='0.1')
    untouched = path.read_text().splitlines()[-1]
    figures = dict(float=0.5, simulated=0.4, onnxruntime=0.3)
    code, _, exported = run(path, figures, '--runtimes', 'float', 'simulated', '--update')
    # what a detector is calibrated for does not depend on the rows that are asked for
    assert exported == [['onnxruntime']]
    rows = {row['runtime']: row for row in conformance.read_table(path)}
    assert code == 0 and rows['simulated']['reference'] == '0.400' and rows['simulated']['processor']
    assert path.read_text().splitlines()[-1] == untouched
    assert run(path, {**figures, 'simulated': 0.39}, '--runtimes', 'simulated')[0] == 1


def test_a_runtime_that_breaks_spoils_no_other_row(table, run, capsys):
    path = table('yolox', float='0.500', simulated='0.500', onnxruntime='0.500', openvino='0.500')
    code, results, exported = run(path, dict(float=0.5, simulated=0.5, openvino=0.5))
    assert exported == [['onnxruntime', 'openvino'], ['onnxruntime'], ['openvino']]
    states = {line['runtime']: line['state'] for line in results}
    assert code == 1 and len(results) == 4
    assert states == dict(float='same', simulated='same', onnxruntime='failed', openvino='same')
    told = capsys.readouterr().out
    row = 'FAILED yolox whole w8a8_observe onnxruntime coco/bbox_mAP'
    assert f'{row}: exit code 1: RuntimeError: onnxruntime broke' in told


@pytest.mark.parametrize(
    'text, wanted',
    [
        ('loading\nerror: the config has no `ptq` block.\n', 'error: the config has no `ptq` block.'),
        (
            'Traceback:\n  f()\nRuntimeError: \nCould not export f.\nmodel.py(1): f\n',
            'RuntimeError: Could not export f.',
        ),
        ('Traceback:\ntorch.onnx.ExportError: no operator\n  at 0x0\n\n', 'torch.onnx.ExportError: no operator'),
        ('Killed\n', 'Killed'),
        ('', 'it printed nothing'),
    ],
)
def test_what_broke_a_run_is_found_in_its_output(tmp_path, text, wanted):
    (tmp_path / 'output.txt').write_text(text)
    assert conformance.what_broke(tmp_path / 'output.txt') == wanted


def test_a_float_detector_that_breaks_fails_its_own_rows(table, run, monkeypatch, capsys):
    def broken(config, options, work_dir):
        raise RuntimeError('no weights')

    monkeypatch.setattr(conformance, 'float_metrics', broken)
    code, (line,), _ = run(table('yolox', float='0.500', simulated='0.500'), {}, '--runtimes', 'float')
    assert code == 1 and line['state'] == 'failed'
    assert 'FAILED yolox whole w8a8_observe float coco/bbox_mAP: RuntimeError: no weights' in capsys.readouterr().out


def test_the_zoo_is_skipped_where_there_is_none(table, run, tmp_path, capsys):
    path = table('nanodet_m_coco', float='0.266', simulated='0.266')
    code, results, exported = run(path, {}, '--zoo', str(tmp_path / 'nowhere'))
    assert code == 0 and exported == []
    assert [line['state'] for line in results] == ['skipped', 'skipped']
    assert 'set MMDET_PTQ_ZOO or --zoo to the detector zoo' in capsys.readouterr().out


def test_what_the_table_does_not_have_is_refused(table, run):
    path = table('yolox', float='0.500')
    with pytest.raises(PTQError, match=r"no row of the table has the detector 'yolo'; .* Did you mean 'yolox'\?"):
        run(path, {}, '--detectors', 'yolo')


def test_the_quick_part_holds(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(conformance.ROOT))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(conformance.ROOT)
    code = conformance.main(['--part', 'quick', '--detectors', 'yolox', '--work-dir', str(tmp_path)])
    with (tmp_path / 'results.csv').open(encoding='utf-8') as file:
        results = list(csv.DictReader(file))
    assert code == 0 and {line['runtime'] for line in results} == {'float', 'simulated'}
    assert {line['state'] for line in results} <= {'same', 'rose'}
