"""A run may stop at any moment; --resume finishes it, to the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config

from mmdet_ptq import cli
from mmdet_ptq.calibration.observe import observe_activations
from mmdet_ptq.deploy import read_quantized
from mmdet_ptq.deploy.checkpoint.packing import unflatten_tensors
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.engine.global_stage.loops import GlobalCalibrationLoop, HeldOutLossLoop
from mmdet_ptq.engine.global_stage.train import GlobalRunner
from mmdet_ptq.engine.stage_store import StageStore, stage_inputs
from mmdet_ptq.testing import tiny_coco
from mmdet_ptq.wrapping import is_quantized

STAGES = 'mmdet_ptq.engine.stages'


@pytest.fixture
def stages(monkeypatch) -> dict[str, bool]:
    """Stage name to whether it was taken over, as runs go by."""
    seen, run = {}, StageStore.run

    def spy(self, name, inputs, work):
        state, seen[name] = run(self, name, inputs, work)
        return state, seen[name]

    monkeypatch.setattr(StageStore, 'run', spy)
    return seen


def tensors(path: Path) -> dict[str, torch.Tensor]:
    state = read_quantized(path)
    return {
        f'{part}.{key}': value for part in ('codes', 'tensors') for key, value in unflatten_tensors(state[part]).items()
    }


def assert_same_run(work_dir: Path, finished: PTQRunner) -> None:
    assert (work_dir / 'quantized.pth').read_bytes() == (Path(finished.work_dir) / 'quantized.pth').read_bytes()
    rows = json.loads((work_dir / 'results.json').read_text())['rows']
    reference = json.loads((Path(finished.work_dir) / 'results.json').read_text())['rows']
    assert rows == reference


@pytest.mark.thorough
def test_resuming_a_finished_run_takes_every_stage_over(finished, finished_copy, make_runner, stages):
    make_runner(work_dir=finished_copy, resume=True).run()
    assert stages == dict.fromkeys(('prepare', 'observe', 'global', 'evaluate_float', 'evaluate_simulated'), True)
    assert_same_run(finished_copy, finished)


@pytest.mark.thorough
def test_without_resume_everything_runs_again(finished_copy, make_runner, stages):
    make_runner({'ptq.global_loss.iters': 1}, work_dir=finished_copy).calibrate()
    assert stages == dict.fromkeys(('prepare', 'observe', 'global'), False)


@pytest.mark.thorough
def test_a_changed_format_runs_again_from_prepare(finished_copy, make_runner, stages):
    make_runner({'ptq.weights': dict(bits=6), 'ptq.global_loss.iters': 1}, finished_copy, resume=True).calibrate()
    assert stages == dict.fromkeys(('prepare', 'observe', 'global'), False)


def test_a_changed_loss_runs_the_global_stage_alone(finished_copy, make_runner, stages):
    make_runner({'ptq.global_loss.iters': 1}, work_dir=finished_copy, resume=True).calibrate()
    assert stages == dict(prepare=True, observe=True) | {'global': False}


@pytest.mark.thorough
def test_another_seed_runs_again_from_prepare(finished_copy, make_runner, stages):
    make_runner({'randomness.seed': 1, 'ptq.global_loss.iters': 1}, work_dir=finished_copy, resume=True).calibrate()
    assert stages == dict.fromkeys(('prepare', 'observe', 'global'), False)


@pytest.mark.thorough
def test_other_images_of_the_same_ids_run_again(finished_copy, make_runner, stages, tmp_path):
    tiny_coco(tmp_path / 'other', seed=1)
    changes = {'train_dataloader.dataset.data_root': str(tmp_path / 'other'), 'ptq.global_loss.iters': 1}
    runner = make_runner(changes, work_dir=finished_copy, resume=True)
    runner.calibrate()
    assert stages == dict.fromkeys(('prepare', 'observe', 'global'), False)


def test_how_images_are_loaded_and_where_models_go_changes_no_calibration(finished_copy, make_runner, stages):
    finished = make_runner(work_dir=finished_copy)
    # with its effect on the formats written out
    changes = {
        'test_dataloader.num_workers': 1,
        'test_dataloader.persistent_workers': True,
        'ptq.export': ['onnxruntime'],
        'ptq.dataflow': finished.ptq.dataflow,
    }
    runner = make_runner(changes, work_dir=finished_copy, resume=True)
    runner.load()
    for stage in (runner.prepare, runner.observe, runner.minimise_global_loss, runner.write_quantized, runner.evaluate):
        stage()
    assert stages == dict.fromkeys(('prepare', 'observe', 'global', 'evaluate_float', 'evaluate_simulated'), True)


@pytest.mark.thorough
def test_another_preprocessor_runs_again(config_file, tmp_path, stages):
    """mmengine takes it from the top level of the config, too."""

    def cfg(mean: float, resume: bool) -> Config:
        cfg = Config.fromfile(config_file)
        cfg.data_preprocessor = {**cfg.model.pop('data_preprocessor'), 'mean': [mean] * 3}
        cfg.ptq.global_loss, cfg.work_dir, cfg.resume = None, str(tmp_path / 'work_dir'), resume
        return cfg

    PTQRunner.from_cfg(cfg(0.0, resume=False)).run()
    again = PTQRunner.from_cfg(cfg(50.0, resume=True))
    again.calibrate()
    again.evaluate()
    assert stages == dict.fromkeys(('prepare', 'observe', 'evaluate_float', 'evaluate_simulated'), False)


@pytest.mark.thorough
@pytest.mark.parametrize('change', ['annotations', 'image'])
def test_a_changed_evaluation_is_evaluated_again(change, config_file, make_runner, tmp_path, stages):
    data = tmp_path / 'data'
    shutil.copytree(config_file.parent, data)
    changes = {
        'test_dataloader.dataset.data_root': str(data),
        'ptq.global_loss': None,
        'test_evaluator.ann_file': str(data / 'annotations' / 'instances_val.json'),
    }
    make_runner(changes).run()
    if change == 'annotations':
        path = data / 'annotations' / 'instances_val.json'
        annotations = json.loads(path.read_text())
        annotations['annotations'][0]['bbox'][2] += 1
        path.write_text(json.dumps(annotations))
    else:
        path = next((data / 'val').glob('*.png'))
        path.write_bytes(path.read_bytes() + b' ')
    make_runner(changes, resume=True).run()
    assert stages == dict(prepare=True, observe=True, evaluate_float=False, evaluate_simulated=False)


@pytest.mark.thorough
def test_a_moved_work_directory_goes_on_in_the_global_stage(make_runner, tmp_path, monkeypatch):
    changes = {'ptq.global_loss.lr': 2.0}  # it only gets worse, so the best state is one from before it was moved
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_a_checkpoint(patch)
        make_runner(changes, tmp_path / 'before').calibrate()
    (tmp_path / 'before').rename(tmp_path / 'after')
    DetLocalVisualizer._instance_dict.pop('visualizer', None)  # of another process, it would write to the new folder
    make_runner(changes, tmp_path / 'after', resume=True).calibrate()
    assert not (tmp_path / 'before').exists()
    before, after = (
        torch.load(tmp_path / 'after' / 'stages' / f'{name}.pth', weights_only=True)['state']
        for name in ('observe', 'global')
    )
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_protection_asks_for_the_runtimes():
    recipe = dict(preset='w8a8', weights=1, export=[], protect=None, reconstruct=None, global_loss=None)
    same, other = stage_inputs(recipe), stage_inputs({**recipe, 'export': ['openvino']})
    assert same == other
    protected = [stage_inputs({**recipe, 'protect': {}, 'export': export}) for export in ([], ['openvino'])]
    assert protected[0]['observe'] == protected[1]['observe'] and protected[0]['protect'] != protected[1]['protect']


@pytest.mark.parametrize('randomness', [None, dict(seed=None)])
def test_a_seed_of_none_is_the_seed_of_the_draw(make_runner, randomness):
    runner = make_runner({'randomness': randomness, 'ptq.calibration.seed': 3})
    assert runner.seed == 3


@pytest.mark.thorough
def test_a_damaged_stage_file_is_named_and_the_stage_runs_again(finished, finished_copy, make_runner, stages):
    path = finished_copy / 'stages' / 'observe.pth'
    path.write_bytes(path.read_bytes()[:5000])
    make_runner(work_dir=finished_copy, resume=True).run()
    assert stages['prepare'] and not stages['observe'] and stages['global']
    log = ''.join(file.read_text() for file in finished_copy.glob('*/*.log'))
    assert 'stage observe: its file cannot be used' in log and str(path) in log
    assert_same_run(finished_copy, finished)


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def in_prepare(patch):
    patch.setattr(f'{STAGES}.calibrate.prepare_detector', stop)


def in_observe(patch):
    def first_batch_only(batches):
        yield next(iter(batches))
        raise KeyboardInterrupt

    patch.setattr(
        f'{STAGES}.calibrate.observe_activations',
        lambda detector, batches, *others: observe_activations(detector, first_batch_only(batches), *others),
    )


def before_the_first_checkpoint(patch):
    at_iteration(patch, 1)


def after_a_checkpoint(patch):
    at_iteration(patch, 3)


def at_iteration(patch, iteration):
    run_iter = GlobalCalibrationLoop.run_iter
    patch.setattr(
        GlobalCalibrationLoop,
        'run_iter',
        lambda self, batch: stop() if self.iter == iteration else run_iter(self, batch),
    )


def between_a_checkpoint_and_its_held_out_loss(patch):
    run = HeldOutLossLoop.run
    patch.setattr(HeldOutLossLoop, 'run', lambda self: stop() if self.runner.iter == 2 else run(self))


def while_a_checkpoint_is_written(patch):
    save = GlobalRunner.save_checkpoint

    def torn(self, out_dir, filename, *args, **kwargs):
        save(self, out_dir, filename, *args, **kwargs)
        if filename == 'iter_4.pth':
            path = Path(out_dir) / filename
            path.write_bytes(path.read_bytes()[:10000])
            raise KeyboardInterrupt

    patch.setattr(GlobalRunner, 'save_checkpoint', torn)


def in_float_evaluation(patch):
    patch.setattr(PTQRunner, 'evaluate_detector', stop)


def in_evaluate(patch):
    evaluate_detector = PTQRunner.evaluate_detector
    patch.setattr(
        PTQRunner,
        'evaluate_detector',
        lambda self, detector, row: stop() if is_quantized(detector) else evaluate_detector(self, detector, row),
    )


def in_report(patch):
    patch.setattr(f'{STAGES}.measure.build_report', stop)


@pytest.mark.parametrize(
    'interrupt',
    [
        after_a_checkpoint,
        *(
            pytest.param(interrupt, marks=pytest.mark.thorough)
            for interrupt in (
                in_observe,
                in_float_evaluation,
                in_prepare,
                before_the_first_checkpoint,
                between_a_checkpoint_and_its_held_out_loss,
                while_a_checkpoint_is_written,
                in_evaluate,
                in_report,
            )
        ),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_numbers(
    interrupt, finished, config_file, tmp_path, monkeypatch, stages, capfd
):
    monkeypatch.setattr(f'{STAGES}.measure.build_report', lambda *args: None)
    late = interrupt in (in_evaluate, in_report)
    arguments = [str(config_file), '--work-dir', str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(SystemExit) as stopped:
            cli.ptq(arguments)
    assert stopped.value.code == 130
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('interrupted;') and '--resume' in last
    stages.clear()
    cli.ptq([*arguments, '--resume'])
    assert stages['evaluate_float'] is (interrupt is not in_float_evaluation)
    assert stages['prepare'] is (interrupt not in (in_float_evaluation, in_prepare))
    assert stages['observe'] is (interrupt not in (in_float_evaluation, in_prepare, in_observe))
    assert stages['global'] is late
    assert_same_run(tmp_path, finished)


@pytest.mark.thorough
@pytest.mark.parametrize('holdout', [pytest.param(0.0, marks=pytest.mark.slow), 0.25])
def test_a_running_average_is_the_result_of_a_resumed_run_too(holdout, make_runner, tmp_path, monkeypatch):
    """mmengine's EMAHook saves the average, and swaps it with what is trained where training goes on from a file."""
    # with the bound on its weights the first state of this random detector is the best, and nothing was averaged
    changes = {
        'ptq.global_loss.hooks': [dict(type='EMAHook', momentum=0.3)],
        'ptq.global_loss.holdout': holdout,
        'ptq.saturation': 'ignore',
    }
    states = {}
    for name in ('once', 'interrupted'):
        work_dir = tmp_path / name
        if name == 'interrupted':
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                after_a_checkpoint(patch)
                make_runner(changes, work_dir).calibrate()
        make_runner(changes, work_dir, resume=name == 'interrupted').calibrate()
        states[name] = torch.load(work_dir / 'stages' / 'global.pth', weights_only=True)['state']
        kept = torch.load(next(work_dir.glob('global/*/best_*' if holdout else 'global/*/iter_4.pth')))
        average, trained = (
            {key: kept['state_dict'][f'detector.{key}'] for key in states[name]},
            {key: kept['ema_state_dict'][f'module.detector.{key}'] for key in states[name]},
        )
        assert any(not torch.equal(average[key], trained[key]) for key in average)
        assert all(torch.equal(value, average[key]) for key, value in states[name].items())
    assert all(torch.equal(value, states['interrupted'][key]) for key, value in states['once'].items())
