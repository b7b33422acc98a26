from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import mmcv
import pytest
import torch
from mmdet.apis import inference_detector
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData

from mmdet_ptq import cli
from mmdet_ptq.deploy import get_runtime, integer_arithmetic, model_bytes, open_model, read_quantized, runtime_detector
from mmdet_ptq.deploy.network.program import PROGRAM
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.engine.api import load_quantized
from mmdet_ptq.engine.detecting import END2END, export_detecting, program_of
from mmdet_ptq.engine.stages.export import export_runtime
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import SIZE, tiny_config, tiny_detector, tiny_model_cfg
from mmdet_ptq.testing.processors import PROCESSORS

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
NAMES = ('onnxruntime', 'openvino')


@pytest.fixture(scope='module')
def exported(config_file, one_thread, tmp_path_factory) -> PTQRunner:
    cfg = Config.fromfile(config_file)
    cfg.ptq = dict(preset='w8a8_observe', calibration=dict(num_images=3, batch_size=3), export=list(NAMES))
    cfg.work_dir = str(tmp_path_factory.mktemp('exported'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)
        runner = PTQRunner.from_cfg(cfg)
        runner.run()
    return runner


@pytest.mark.thorough
def test_every_runtime_has_a_row_of_the_evaluator(exported):
    results = json.loads((Path(exported.work_dir) / 'results.json').read_text())
    rows = {row['model']: row for row in results['rows']}
    assert list(rows) == ['float', 'simulated', 'onnxruntime', 'simulated for openvino', 'openvino']
    for name, simulated in (('onnxruntime', 'simulated'), ('openvino', 'simulated for openvino')):
        row, simulated = rows[name], rows[simulated]['metrics']
        assert row['metrics'].keys() == simulated.keys() and row['latency_ratio'] > 0
        assert row['metrics']['coco/bbox_mAP'] == pytest.approx(simulated['coco/bbox_mAP'], abs=0.02)
        suffix = {'onnxruntime': 'onnx', 'openvino': 'xml'}[row['model']]
        stored = Path(exported.work_dir) / row['model'] / 'float' / f'model.{suffix}'
        assert 0 < row['size_bytes'] < model_bytes(stored)
    # what is simulated is what its integer kernels compute
    assert rows['onnxruntime']['metrics'] == rows['simulated']['metrics']
    layers = {layer['name'] for layer in results['coverage']['layers']}
    for name in NAMES:
        coverage = results['runtimes'][name]
        assert coverage['float'] == [] and {call.split('#')[0] for call in coverage['integer']} == layers


@pytest.mark.thorough
def test_the_detector_stays_where_it_is(exported, monkeypatch):
    """On a GPU the report compares it with the float detector there."""
    given = []

    def export(detector, *args):
        given.append(detector)
        raise KeyboardInterrupt

    monkeypatch.setattr(get_runtime('onnxruntime'), 'export', export)
    with pytest.raises(KeyboardInterrupt):
        export_runtime(exported, 'onnxruntime')
    assert given[0] is not exported.detector


@pytest.mark.thorough
def test_asking_for_onnx_runtime_asks_for_its_dataflow(exported):
    assert exported.ptq.dataflow == 'balanced'


@pytest.mark.thorough
def test_one_run_exports_to_runtimes_that_take_other_formats_too(config_file, one_thread, tmp_path, monkeypatch):
    pytest.importorskip('ncnn', reason="needs pip install 'mmdet-ptq[ncnn]'")
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)
    monkeypatch.setattr('mmdet_ptq.engine.stages.export.export_detecting', lambda *args: None)
    cfg = Config.fromfile(config_file)
    cfg.ptq = dict(preset='w8a8_observe', calibration=dict(num_images=3, batch_size=3), export=['onnxruntime', 'ncnn'])
    cfg.work_dir = str(tmp_path)
    results = PTQRunner.from_cfg(cfg).run()
    rows = {row['model']: row['metrics'] for row in results['rows']}
    assert list(rows) == ['float', 'simulated', 'onnxruntime', 'simulated for ncnn', 'ncnn']
    assert rows['onnxruntime'] == rows['simulated']
    assert rows['ncnn']['coco/bbox_mAP'] == pytest.approx(rows['simulated for ncnn']['coco/bbox_mAP'], abs=0.02)
    first, second = (read_quantized(tmp_path / folder / 'quantized.pth') for folder in ('.', 'ncnn'))
    assert first['structure']['sites'] and not second['structure']['sites']
    specs = [entry['spec'] for entry in second['structure']['activations'].values()]
    assert specs and all(spec['narrow_range'] and spec['shared_zero_point'] for spec in specs)
    assert results['recipe']['export'] == ['onnxruntime', 'ncnn'] and results['recipe']['dataflow'] == 'balanced'
    assert {'observe', 'ncnn_observe'} <= results['stages'].keys()
    assert all(coverage['integer'] and not coverage['float'] for coverage in results['runtimes'].values())


@pytest.mark.thorough
def test_exported_models_are_taken_over_on_resume(exported, monkeypatch):
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)
    monkeypatch.setattr('mmdet_ptq.engine.stages.export.export_runtime', lambda *args: pytest.fail('exported again'))
    cfg = Config.fromfile(exported.cfg.filename)
    cfg.merge_from_dict(dict(ptq=exported.cfg.ptq.to_dict(), work_dir=exported.work_dir, resume=True))
    cfg.ptq = exported.cfg.ptq
    runner = PTQRunner.from_cfg(cfg)
    runner.run()
    assert runner.results['rows'] == exported.results['rows']


@pytest.mark.thorough
@pytest.mark.parametrize('model', ['onnxruntime/model.onnx', 'openvino/model.xml'])
def test_the_test_command_gives_the_row_of_an_exported_model(exported, config_file, tmp_path, capsys, model):
    cli.test([str(config_file), f'{exported.work_dir}/{model}', '--work-dir', str(tmp_path)])
    logged = json.loads(next(tmp_path.glob('2*/2*.json')).read_text().splitlines()[-1])
    row = next(row for row in exported.results['rows'] if row['model'] == model.split('/')[0])
    assert {key: logged[key] for key in row['metrics']} == pytest.approx(row['metrics'])
    assert model.split('/')[0] in capsys.readouterr().out


@pytest.mark.thorough
def test_a_runtime_answers_like_a_detector(exported, config_file):
    model = open_model(f'{exported.work_dir}/onnxruntime/model.onnx')
    detector = runtime_detector(exported.cfg, model, exported.detector.dataset_meta)
    image = str(sorted((config_file.parent / 'val').glob('*.png'))[0])
    found = inference_detector(detector, image).pred_instances
    assert len(found) > 0 and found.bboxes.shape[1] == 4


# an image of 90x50 (height x width) becomes 64x36 and is padded at the end, 64x64, 64x36 and is padded by the pipeline
PIPELINES = dict(
    ratio_kept=[dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=True)],
    ratio_not_kept=[dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=False)],
    padded=[
        dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=True),
        dict(type='Pad', size=(SIZE, SIZE), pad_val=dict(img=(114.0, 114.0, 114.0))),
    ],
)


def photo(exported: PTQRunner, folder: Path) -> str:
    """An image that is no square."""
    image = mmcv.imread(str(sorted((Path(exported.cfg.filename).parent / 'val').glob('*.png'))[0]))
    mmcv.imwrite(mmcv.imresize(image, (50, 90)), str(folder / 'photo.png'))
    return str(folder / 'photo.png')


def expected_boxes(exported: PTQRunner, name: str, pipeline: list[dict], image: str) -> InstanceData:
    """What mmdet finds with the network in a runtime, within the image."""
    cfg = copy.deepcopy(exported.cfg)
    read, *_, pack = cfg.test_dataloader.dataset.pipeline
    cfg.test_dataloader.dataset.pipeline = [read, *pipeline, pack]
    path = Path(exported.work_dir) / name / f'model{get_runtime(name).suffix}'
    detector = runtime_detector(cfg, open_model(path), exported.detector.dataset_meta)
    found = inference_detector(detector, image).pred_instances
    height, width = mmcv.imread(image).shape[:2]
    found.bboxes = found.bboxes.clamp(min=0).minimum(torch.tensor([width, height] * 2))
    return found


def check_printed(printed: str, expected: InstanceData, threshold: float) -> None:
    """Every detection of one side is one of the other's.

    Those at the threshold may fall on either side of it; in very small ones what is printed is rounded.
    """
    rows = [line.split() for line in printed.splitlines()]
    rows = [row for row in rows if min(float(row[4]) - float(row[2]), float(row[5]) - float(row[3])) > 2]
    sides = (expected.bboxes[:, 2:] - expected.bboxes[:, :2]).amin(1)
    classes = ('red', 'green', 'blue')
    labels = torch.tensor([classes.index(row[0]) for row in rows])
    scores, boxes = (
        torch.tensor([[float(v) for v in row[part]] for row in rows]) for part in (slice(1, 2), slice(2, 6))
    )
    near = (bbox_overlaps(boxes, expected.bboxes) >= 0.99) & (labels[:, None] == expected.labels)
    near &= (scores - expected.scores).abs() <= 0.01
    assert len(rows) > 3 and near.any(1).all()
    assert near.any(0)[(expected.scores > threshold + 0.01) & (sides > 2.1)].all()


@pytest.mark.thorough
@pytest.mark.parametrize('pipeline', PIPELINES)
@pytest.mark.parametrize('name', NAMES)
def test_the_program_beside_a_model_finds_what_mmdet_finds(exported, name, pipeline, tmp_path):
    image, steps = photo(exported, tmp_path), PIPELINES[pipeline]
    expected = expected_boxes(exported, name, steps, image)
    read, *_, pack = exported.cfg.test_dataloader.dataset.pipeline
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[read, *steps, pack]))))
    runtime, folder = get_runtime(name), Path(exported.work_dir) / name
    program = program_of(exported.detector, runtime, exported.input_shape, cfg, f'{END2END}/model{runtime.suffix}')
    if pipeline == 'ratio_kept':  # the run's own
        assert (folder / PROGRAM).read_text() == program
    file = tmp_path / PROGRAM
    file.write_text(program)
    threshold = float(expected.scores[-3])
    options = ['--model', str(folder / END2END / f'model{runtime.suffix}'), '--threshold', str(threshold)]
    # nothing of mmdet or of us can be imported
    (tmp_path / 'mmdet.py').write_text('raise ImportError')
    (tmp_path / 'mmdet_ptq.py').write_text('raise ImportError')
    done = subprocess.run(
        [sys.executable, str(file), image, *options], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    check_printed(done.stdout, expected, threshold)
    drawn = mmcv.imread(str(tmp_path / 'detections.png'))
    assert drawn.shape == (90, 50, 3) and (drawn != mmcv.imread(image)).any()


@pytest.fixture(scope='module')
def end2end(exported, tmp_path_factory):
    """A program that the export command wrote."""
    folder = tmp_path_factory.mktemp('end2end')
    cli.export([f'{exported.work_dir}/quantized.pth', '--to', 'onnxruntime', '--end2end', '--out', str(folder)])
    return folder / 'onnxruntime' / PROGRAM


@pytest.mark.thorough
@pytest.mark.parametrize('processor', ['here', *PROCESSORS])
def test_the_program_of_the_export_command_runs_on_processors_without_vnni(
    exported, end2end, on_processor, processor, tmp_path, monkeypatch
):
    image = photo(exported, tmp_path)
    expected = expected_boxes(exported, 'onnxruntime', PIPELINES['ratio_kept'], image)
    threshold = float(expected.scores[-3])
    code = 'import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name="__main__")'
    monkeypatch.chdir(tmp_path)
    check_printed(
        on_processor(processor, code, str(end2end), image, '--threshold', str(threshold)), expected, threshold
    )


@pytest.mark.thorough
def test_what_has_no_end_to_end_model_is_told_in_one_sentence(exported, tmp_path, monkeypatch):
    said, runtime = [], get_runtime('onnxruntime')
    monkeypatch.setattr('mmdet_ptq.engine.detecting.print_log', lambda text, *_: said.append(text))
    before = tmp_path / PROGRAM
    before.write_text('of an earlier run')
    detector = tiny_detector('faster_rcnn')
    detector.rpn_head.__class__ = type('MyRPN', (type(detector.rpn_head),), dict(_predict_by_feat_single=None))
    export_detecting(detector, runtime, tmp_path, (1, 3, SIZE, SIZE), exported.cfg)
    assert said == ['onnxruntime: no end-to-end model and no detect.py: MyRPN proposes in a way of its own']
    cfg = copy.deepcopy(exported.cfg)
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type='RandomFlip', prob=0.5))
    export_detecting(exported.detector, runtime, tmp_path, exported.input_shape, cfg)
    assert said[1].endswith('no detect.py: the test pipeline has RandomFlip, which is unknown')
    # what breaks there breaks no run, which has its model by then
    monkeypatch.setattr(runtime, 'export', lambda *args, **kwargs: 1 / 0)
    export_detecting(exported.detector, runtime, tmp_path, exported.input_shape, exported.cfg)
    assert 'ZeroDivisionError' in said[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_the_export_command_writes_what_the_run_wrote(exported, tmp_path, capsys):
    image = sorted(Path(exported.work_dir).parent.parent.glob('**/val/*.png'))
    arguments = [f'{exported.work_dir}/quantized.pth', '--to', 'onnxruntime', '--out', str(tmp_path)]
    cli.export(arguments + (['--compare', str(image[0])] if image else []))
    first = (Path(exported.work_dir) / 'onnxruntime' / 'model.onnx').read_bytes()
    assert (tmp_path / 'onnxruntime' / 'model.onnx').read_bytes() == first


@pytest.mark.thorough
def test_a_checkpoint_without_what_onnx_runtime_needs_is_warned_of(exported, finished, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(MMLogger.get_instance('mmdet_ptq_export'), 'warning', said.append)
    cli.export([f'{exported.work_dir}/quantized.pth', '--to', 'onnxruntime', '--out', str(tmp_path)])
    assert said == []
    cli.export([f'{finished.work_dir}/quantized.pth', '--to', 'onnxruntime', '--out', str(tmp_path)])
    assert len(said) == 1 and 'the checkpoint was calibrated without `ptq.dataflow`' in said[0]


@pytest.mark.thorough
@pytest.mark.parametrize(
    'arguments,told',
    [
        (['--to', 'onnxruntim'], "Did you mean 'onnxruntime'"),
        (['--to', 'tensorrt', '--compare', 'image.jpg'], 'reads the tensors of ncnn, onnxruntime, openvino'),
        (['--to', 'onnxruntime', '--compare', 'no_such_image.jpg'], "cannot read the image 'no_such_image.jpg'"),
        (['--to', 'openvino', '--input-shape', '0', '0'], '--input-shape must be two positive numbers'),
        (['--to', 'onnxruntime', '--input-shape', '-5', '128'], '--input-shape must be two positive numbers'),
    ],
)
def test_mistakes_of_the_export_command(exported, tmp_path, capsys, arguments, told):
    with pytest.raises(SystemExit) as stopped:
        cli.export([f'{exported.work_dir}/quantized.pth', *arguments, '--out', str(tmp_path)])
    assert stopped.value.code == 2 and told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
@pytest.mark.parametrize('runtime', NAMES)
def test_a_folder_that_cannot_be_written_is_refused(exported, tmp_path, capsys, runtime):
    (tmp_path / runtime).write_text('a file')
    with pytest.raises(SystemExit) as stopped:
        cli.export([f'{exported.work_dir}/quantized.pth', '--to', runtime, '--out', str(tmp_path)])
    assert stopped.value.code == 2 and 'choose another --out' in capsys.readouterr().err


@pytest.mark.thorough
def test_a_model_that_is_gone_is_exported_again_on_resume(exported, monkeypatch):
    path = Path(exported.work_dir) / 'openvino' / 'model.bin'
    content = path.read_bytes()
    path.unlink()
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)
    cfg = Config.fromfile(exported.cfg.filename)
    cfg.merge_from_dict(dict(work_dir=exported.work_dir, resume=True))
    cfg.ptq = exported.cfg.ptq
    PTQRunner.from_cfg(cfg).run()
    assert path.read_bytes() == content


@pytest.mark.thorough
def test_a_model_of_another_detector_is_refused(exported):
    model = open_model(f'{exported.work_dir}/onnxruntime/model.onnx')
    other = tiny_model_cfg('ssd')
    with pytest.raises(PTQError, match='was exported from another detector'):
        runtime_detector(Config(dict(model=other)), model)


class Unexportable(torch.nn.Module):
    """A neck with an operator that has no ONNX form."""

    def forward(self, feats):
        return [f + torch.linalg.svdvals(f).sum() for f in feats]


def test_an_operator_without_onnx_form_is_refused_before_any_work(make_runner, monkeypatch):
    runner = make_runner(dict(ptq=dict(export=['onnxruntime'])))
    load = runner.load

    def changed() -> None:
        load()
        runner.float_detector.neck = torch.nn.Sequential(runner.float_detector.neck, Unexportable())

    monkeypatch.setattr(runner, 'load', changed)
    monkeypatch.setattr(
        'mmdet_ptq.engine.stages.calibrate.prepare_detector', lambda *args: pytest.fail('the work has begun')
    )
    with pytest.raises(
        PTQError, match='cannot be exported to ONNX, in neck.1, line [0-9]+ of .*py: .*replace that operation'
    ):
        runner.calibrate()


def test_an_unknown_runtime_is_refused_before_any_work(make_runner):
    with pytest.raises(PTQError, match=r"`ptq.export` knows .*Did you mean 'openvino'"):
        make_runner(dict(ptq=dict(export=['openvin'])))


def test_a_missing_package_is_refused_before_any_work(make_runner, monkeypatch):
    runner = make_runner(dict(ptq=dict(export=['openvino'])))
    monkeypatch.setitem(__import__('sys').modules, 'openvino', None)
    monkeypatch.setattr(
        'mmdet_ptq.engine.stages.calibrate.prepare_detector', lambda *args: pytest.fail('the work has begun')
    )
    with pytest.raises(PTQError, match=r"pip install 'mmdet-ptq\[openvino\]'"):
        runner.calibrate()


@pytest.mark.thorough
def test_a_model_of_another_size_is_refused(exported, config_file):
    model = open_model(f'{exported.work_dir}/onnxruntime/model.onnx')
    model.meta['input_shape'] = [1, 3, 32, 32]
    del model.meta['raw_shapes']
    detector = runtime_detector(exported.cfg, model)
    with pytest.raises(PTQError, match='was exported for images of 32x32'):
        inference_detector(detector, str(sorted((config_file.parent / 'val').glob('*.png'))[0]))


def cut(folder: Path, split: str, sizes: list[tuple[int, int]]) -> None:
    """Cuts the images of a tiny COCO to several sizes."""
    path = folder / 'annotations' / f'instances_{split}.json'
    told = json.loads(path.read_text())
    for entry, (height, width) in zip(told['images'], itertools.cycle(sizes), strict=False):
        file = str(folder / split / entry['file_name'])
        mmcv.imwrite(mmcv.imread(file)[:height, :width].copy(), file)
        entry.update(height=height, width=width)
    path.write_text(json.dumps(told))


@pytest.fixture(scope='module')
def several_sizes(one_thread, tmp_path_factory) -> PTQRunner:
    """A run whose test pipeline keeps the ratio of the images, as stock ones do."""
    folder = tmp_path_factory.mktemp('several_sizes')
    cfg = tiny_config('retinanet', folder)
    cut(folder, 'train', [(64, 48), (40, 64)])
    cut(folder, 'val', [(64, 64), (32, 64), (64, 25)])
    cfg.model.data_preprocessor.pad_size_divisor = 16
    cfg.test_dataloader.dataset.pipeline[2].scale = (80, 48)  # the longer side, the shorter one
    cfg.ptq = dict(preset='w8a8_observe', calibration=dict(num_images=2, batch_size=2), export=['onnxruntime'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)
        patch.setattr('mmdet_ptq.engine.stages.export.export_detecting', lambda *args: None)
        runner = PTQRunner.from_cfg(cfg)
        runner.run()
    return runner


@pytest.mark.thorough
def test_images_of_several_sizes_are_padded_and_computed_as_simulated(several_sizes, tmp_path):
    # 64x64 -> 48x48, 32x64 -> 40x80, 64x25 -> 80x31, 64x48 -> 64x48, 40x64 -> 48x77
    assert several_sizes.canvas == (80, 80)
    model = open_model(f'{several_sizes.work_dir}/onnxruntime/model.onnx')
    assert model.meta['input_shape'] == [1, 3, 80, 80]
    results = json.loads((Path(several_sizes.work_dir) / 'results.json').read_text())
    rows = {row['model']: row['metrics'] for row in results['rows']}
    assert rows['onnxruntime'] == rows['simulated']
    # what padding changes is told apart from what quantization does
    assert results['canvas']['size'] == [80, 80]
    assert results['canvas']['float_metrics'].keys() == rows['float'].keys()
    loaded = load_quantized(f'{several_sizes.work_dir}/quantized.pth')
    exported = runtime_detector(several_sizes.cfg, model)
    for detector in (loaded, exported):
        detector.cfg = several_sizes.cfg
    for file in sorted((Path(several_sizes.cfg.load_from).parent / 'val').glob('*.png'))[:3]:
        with integer_arithmetic(loaded):
            ours = inference_detector(loaded, str(file)).pred_instances
        theirs = inference_detector(exported, str(file)).pred_instances
        assert len(ours) == len(theirs) > 0
        torch.testing.assert_close(ours.bboxes, theirs.bboxes, atol=1e-3, rtol=1e-3)


@pytest.mark.thorough
def test_sizes_that_stay_open_are_computed_without_a_canvas(several_sizes, tmp_path, monkeypatch):
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)
    cfg = copy.deepcopy(several_sizes.cfg)
    cfg.ptq.export_size, cfg.work_dir = 'dynamic', str(tmp_path)
    cfg.model.data_preprocessor.pad_size_divisor = 32
    cfg.experiment_name = 'open_sizes'
    runner = PTQRunner.from_cfg(cfg)
    runner.run()
    assert runner.canvas is None and runner.input_shape == (1, 3, 96, 96)
    model = open_model(tmp_path / 'onnxruntime' / 'model.onnx')
    assert model.meta['size_divisor'] == 32
    results = json.loads((tmp_path / 'results.json').read_text())
    rows = {row['model']: row['metrics'] for row in results['rows']}
    assert rows['onnxruntime'] == rows['simulated'] and 'canvas' not in results
    # what cannot have a grid of its own is told
    assert not (tmp_path / 'onnxruntime' / 'detect.py').exists()
    runner = PTQRunner.from_cfg(dict(cfg, resume=True, experiment_name='open_sizes_again'))
    runner.run()
    assert [row['metrics'] for row in runner.results['rows']] == [*rows.values()]


def test_a_size_that_does_not_hold_an_image_is_refused_before_the_calibration(make_runner, tmp_path):
    with pytest.raises(PTQError, match=r'`ptq.export_size` is 32x64 .* image of 64x64'):
        make_runner({'ptq.export': ['onnxruntime'], 'ptq.export_size': (32, 64)}).calibrate()
    assert not list((tmp_path / 'work_dir').glob('stages/*'))
