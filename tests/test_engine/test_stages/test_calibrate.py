"""Protection and reconstruction as parts of a run, killed after any of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config

from mmdet_ptq import load_quantized
from mmdet_ptq.calibration.protection.damage import DamageStore
from mmdet_ptq.deploy import load_quantized_state, quantized_state, read_quantized, settle_biases
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.engine.stage_store import StageStore, stage_inputs
from mmdet_ptq.testing import raw_outputs, tiny_config

MIN_MAX = dict(type='mmdet_ptq.MinMaxObserver')
PTQ = dict(
    preset='w8a8_observe',
    calibration=dict(num_images=3, batch_size=2),
    weights=dict(bits=4),
    activations=dict(observer=MIN_MAX, depthwise_per_channel=False),
    protect=dict(images=1, max_tensors=1, candidates=['8bit']),
    reconstruct=dict(iters=0, compensate=True, granularity='layer'),
    global_loss=dict(iters=2, batch_size=1, holdout=0, checkpoint_interval=1, log_interval=1),
)
PLAIN = dict(protect=None, reconstruct=None, global_loss=None)
STAGES = ['prepare', 'observe', 'protect', 'reconstruct', 'global']


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture(scope='module')
def config_file(tmp_path_factory) -> Path:
    """A small detector with layers that have no bias: one normalisation per level after a shared convolution."""
    folder = tmp_path_factory.mktemp('sep_bn')
    cfg = tiny_config('retinanet', folder)
    cfg.model.backbone.update(num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    cfg.model.neck.update(in_channels=[8], out_channels=8, num_outs=2)
    cfg.model.bbox_head.update(
        type='RetinaSepBNHead', num_ins=2, in_channels=8, feat_channels=8, norm_cfg=dict(type='BN')
    )
    cfg.model.bbox_head.anchor_generator.strides = [4, 8]
    torch.manual_seed(0)
    detector = MODELS.build(cfg.model)
    for module in detector.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
    # boxes of a moderate size, which a small error moves and does not destroy
    detector.bbox_head.retina_reg.weight.data *= 0.02
    torch.save(dict(state_dict=detector.state_dict(), meta={}), cfg.load_from)
    cfg.ptq = PTQ
    cfg.dump(folder / 'tiny.py')
    return folder / 'tiny.py'


def runner(config_file: Path, work_dir: Path, resume: bool = False, **changes) -> PTQRunner:
    DetLocalVisualizer._instance_dict.pop('visualizer', None)
    cfg = Config.fromfile(config_file)
    cfg.ptq.update(changes)
    cfg.work_dir, cfg.resume = str(work_dir), resume
    return PTQRunner.from_cfg(cfg)


@pytest.fixture(scope='module')
def finished(config_file, tmp_path_factory) -> PTQRunner:
    """After a whole run with its report."""
    whole = runner(config_file, tmp_path_factory.mktemp('whole'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmdet_ptq.analysis.pictures.DPI', 30)
        whole.run()
    return whole


def tensors(work_dir: str | Path) -> dict[str, torch.Tensor]:
    state = read_quantized(Path(work_dir) / 'quantized.pth')
    return {f'{part}.{key}': value for part in ('codes', 'tensors') for key, value in state[part]['data'].items()}


def kill_at_the_fourth_measurement(patch) -> None:
    put = DamageStore.put

    def put_or_die(self, key, damage):
        if len(self.values) == 3:
            raise Killed
        put(self, key, damage)

    patch.setattr(DamageStore, 'put', put_or_die)


@pytest.mark.thorough
def test_a_run_killed_after_each_stage_ends_at_the_same_numbers(finished, config_file, tmp_path, monkeypatch):
    run, seen = StageStore.run, {}

    def killed_after(victim):
        def stage(self, name, inputs, work):
            state, seen[name] = run(self, name, inputs, work)
            if name == victim:
                raise Killed
            return state, seen[name]

        return stage

    for place, victim in enumerate(STAGES):
        if victim == 'protect':
            with monkeypatch.context() as patch:
                patch.setattr(StageStore, 'run', run)
                kill_at_the_fourth_measurement(patch)
                with pytest.raises(Killed):
                    runner(config_file, tmp_path, resume=True).calibrate()
            assert len(json.loads((tmp_path / 'protect' / 'measurements.json').read_text())['damage']) == 3
        seen.clear()
        monkeypatch.setattr(StageStore, 'run', killed_after(victim))
        with pytest.raises(Killed):
            runner(config_file, tmp_path, resume=place > 0).calibrate()
        # every stage that an earlier run finished is taken over, and built upon
        assert seen == {name: name != victim for name in STAGES[: place + 1]}
    monkeypatch.setattr(StageStore, 'run', killed_after(None))
    again = runner(config_file, tmp_path, resume=True)
    again.calibrate()
    assert all(seen.values()) and list(seen) == STAGES
    found, expected = tensors(tmp_path), tensors(finished.work_dir)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert again.protection == finished.protection
    strip = [[{k: v for k, v in unit.items() if k != 'seconds'} for unit in r.units] for r in (again, finished)]
    assert strip[0] == strip[1]


def test_each_stage_did_its_work(finished):
    states = {name: torch.load(finished.stages.path(name), weights_only=True)['state'] for name in STAGES}
    prepared, protected = states['prepare']['structure'], states['protect']['structure']
    # protection: the one weight that more bits help most
    bits = [[layer['weight']['bits'] for layer in s['layers']] for s in (prepared, protected)]
    assert set(bits[0]) == {4} and sorted(bits[1])[-2:] == [4, 8]
    assert len(finished.protection.choices) == 1
    # reconstruction: weights moved, no unit is worse on the images held out
    weights = [
        {k: v for k, v in states[name]['model'].items() if k.endswith('original')}
        for name in ('protect', 'reconstruct')
    ]
    assert any(not torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert finished.units and all(unit['after'] <= unit['before'] for unit in finished.units)


def test_the_integer_checkpoint_gives_the_calibrated_detector(finished, config_file):
    loaded = load_quantized(f'{finished.work_dir}/quantized.pth')
    for a, b in zip(raw_outputs(loaded), raw_outputs(finished.detector), strict=True):
        assert torch.equal(a, b)
    # and that is the detector the last stage left, with biases as integer kernels add them
    last = runner(config_file, finished.work_dir, resume=True)
    last.load()
    for stage in STAGES[:-1]:
        getattr(last, stage)()
    last.minimise_global_loss()
    settle_biases(last.detector, last.structure)
    for a, b in zip(raw_outputs(loaded), raw_outputs(last.detector), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_a_checkpoint_without_the_list_of_biases_loads(config_file, tmp_path):
    old = runner(config_file, tmp_path, **PLAIN)
    old.calibrate()
    state = quantized_state(old.detector, old.structure, {}, None)
    assert state['structure'].pop('biases') == []
    detector = runner(config_file, tmp_path / 'other').detector
    load_quantized_state(detector, state)
    for a, b in zip(raw_outputs(detector.eval()), raw_outputs(old.detector), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.thorough
def test_a_checkpoint_above_the_budget_is_told(finished, config_file, tmp_path):
    for limit, told in ((1e9, False), (1.0, True)):
        over = runner(config_file, tmp_path, **PLAIN)
        over.protection = replace(finished.protection, size_limit=limit)
        over.calibrate()
        log = ''.join(file.read_text() for file in tmp_path.glob('*/*.log'))
        assert ('more than the budget of `ptq.protect` allows' in log) is told


def test_results_and_the_page_tell_it(finished):
    results = json.loads((Path(finished.work_dir) / 'results.json').read_text())
    assert set(STAGES) <= set(results['stages'])
    (choice,) = results['protection']['choices']
    assert list(results['protection']['overrides']) == choice['layers']
    assert [unit['name'] for unit in results['reconstruction']] == [unit['name'] for unit in finished.units]
    page = (Path(finished.work_dir) / 'report.html').read_text()
    assert 'Protected tensors' in page and choice['tensor'] in page and choice['now'] in page
    assert 'Reconstruction' in page and finished.units[0]['name'] in page


def test_a_stage_depends_on_its_own_key_and_on_those_before():
    recipe = dict(preset='a', weights={}, export=[], protect=None, reconstruct=None, global_loss=None)
    before = stage_inputs(recipe, 'model')
    order = ['prepare', 'protect', 'reconstruct', 'global']
    keys = ['weights', 'protect', 'reconstruct', 'global_loss']
    for place, key in enumerate(keys):
        after = stage_inputs({**recipe, key: 1}, 'model')
        assert [before[stage] == after[stage] for stage in order] == [i < place for i in range(len(order))]
        assert after['observe'] == after['prepare']
    assert stage_inputs({**recipe, 'preset': 'b'}, 'model') == before
    assert set(stage_inputs(recipe, 'other').values()).isdisjoint(before.values())
