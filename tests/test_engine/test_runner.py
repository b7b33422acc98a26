from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmdet.apis import inference_detector
from mmengine.config import Config
from mmengine.runner import Runner

from mmdet_ptq import cli, load_quantized
from mmdet_ptq.errors import PTQError
from mmdet_ptq.registry import RUNNERS


def image(config_file: Path) -> str:
    return str(sorted((config_file.parent / 'val').glob('*.png'))[0])


def test_the_runner_is_registered_and_can_be_built_from_a_config(config_file, finished):
    assert RUNNERS.get('mmdet_ptq.PTQRunner') is type(finished)


def test_results_json_has_every_key_of_the_schema(finished, config_file):
    results = json.loads((Path(finished.work_dir) / 'results.json').read_text())
    assert results['schema'] == 1
    assert {'config', 'recipe', 'seed', 'versions', 'date', 'calibration', 'coverage', 'stages', 'rows'} <= set(results)
    assert results['config'] == str(config_file)
    assert results['recipe']['global_loss']['iters'] == 4
    assert results['seed'] == 0
    assert {'mmdet_ptq', 'torch', 'mmengine', 'mmcv', 'mmdet'} <= set(results['versions'])
    assert results['calibration']['num_images'] == len(set(results['calibration']['image_ids'])) == 6
    assert results['coverage']['integer_mac_share'] == 1.0
    assert {layer['name'] for layer in results['coverage']['layers']} >= {'backbone.conv1', 'bbox_head.retina_cls'}
    assert {'prepare', 'observe', 'global', 'evaluate_float', 'evaluate_simulated', 'report'} == set(results['stages'])
    assert all(stage['seconds'] >= 0 for stage in results['stages'].values())
    assert [row['model'] for row in results['rows']] == ['float', 'simulated']
    for row in results['rows']:
        assert {'metrics', 'size_bytes', 'bops', 'latency_ratio'} <= set(row)
        assert 'coco/bbox_mAP' in row['metrics'] and row['size_bytes'] > 0 and row['bops'] > 0
    assert results['rows'][1]['bops'] * 16 == results['rows'][0]['bops']


def test_a_run_leaves_the_checkpoint_and_the_report(finished):
    assert (Path(finished.work_dir) / 'quantized.pth').stat().st_size == finished.results['rows'][1]['size_bytes']
    assert '<html' in (Path(finished.work_dir) / 'report.html').read_text()


def test_the_float_row_is_what_mmengine_measures(finished, config_file, tmp_path):
    cfg = Config.fromfile(config_file)
    cfg.work_dir = str(tmp_path)
    assert Runner.from_cfg(cfg).test() == pytest.approx(finished.results['rows'][0]['metrics'], abs=0)


def test_the_test_command_gives_the_figures_of_the_run(finished, config_file, tmp_path, capsys):
    cli.test([str(config_file), f'{finished.work_dir}/quantized.pth', '--work-dir', str(tmp_path)])
    logged = json.loads(next(tmp_path.glob('2*/2*.json')).read_text().splitlines()[-1])
    metrics = finished.results['rows'][1]['metrics']
    assert {key: logged[key] for key in metrics} == metrics
    assert 'coco/bbox_mAP' in capsys.readouterr().out


def test_a_loaded_detector_detects_exactly_what_the_runner_does(finished, config_file):
    loaded = load_quantized(f'{finished.work_dir}/quantized.pth')
    finished.detector.cfg = finished.cfg
    expected = inference_detector(finished.detector, image(config_file)).pred_instances
    found = inference_detector(loaded, image(config_file)).pred_instances
    assert len(found) > 0
    for key in ('bboxes', 'scores', 'labels'):
        assert torch.equal(found[key], expected[key])
    assert loaded.dataset_meta['classes'] == ('red', 'green', 'blue')


def test_quantizing_changes_the_detector_and_spares_the_float_one(finished, config_file):
    stored = torch.load(finished.checkpoint, weights_only=True)['state_dict']
    assert all(torch.equal(value, stored[key]) for key, value in finished.float_detector.state_dict().items())
    sample = next(iter(finished.test_loop.dataloader))
    with torch.no_grad():
        before, after = (
            model.test_step(sample)[0].pred_instances for model in (finished.float_detector, finished.detector)
        )
    assert len(before) != len(after) or not torch.equal(before.bboxes, after.bboxes)


def test_custom_hooks_of_the_training_are_announced_and_not_used(make_runner, tmp_path):
    runner = make_runner({'custom_hooks': [dict(type='EMAHook')]})
    assert not any(type(hook).__name__ == 'EMAHook' for hook in runner.hooks)


def test_processes_of_a_run_that_differ_are_told(make_runner, monkeypatch):
    runner = make_runner()
    gathered = 'mmdet_ptq.engine.run.all_gather_object'
    monkeypatch.setattr(gathered, lambda mine: [mine, mine])
    runner.load()
    for what, value in (('the seed', 7), ('the calibration images that it could not read', ['a.png'])):
        monkeypatch.setattr(gathered, lambda mine, what=what, value=value: [mine, {**mine, what: value}])
        with pytest.raises(PTQError, match=f'^process 0 and process 1 of this run differ in {what}: .*; start all by'):
            runner.check_agreement()
