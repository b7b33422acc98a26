"""The global stage is mmengine's own training loop, on quantization parameters alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmdet_ptq import PTQError
from mmdet_ptq.config import CalibrationConfig, GlobalLossConfig
from mmdet_ptq.engine.global_stage.hooks import FilteredGlobalLossHook
from mmdet_ptq.engine.global_stage.loops import GlobalCalibrationLoop
from mmdet_ptq.engine.global_stage.optim import learnable_parameters, train_only_quantization
from mmdet_ptq.engine.global_stage.train import GlobalLossModel
from mmdet_ptq.testing import tiny_quantized
from mmdet_ptq.wrapping.weights import float_weight, quantized_weights


@HOOKS.register_module()
class SpyHook(Hook):
    """A user's hook: keeps what it sees in each iteration."""

    records: list[dict] = []

    def before_train(self, runner) -> None:
        SpyHook.records = []
        detector = runner.model.detector
        self.gradients: dict[str, float] = {}
        self.trained = [entry for entry in learnable_parameters(detector) if entry[2].requires_grad]
        for name, _, parameter, _ in self.trained:
            parameter.register_hook(
                lambda grad, name=name: self.gradients.update(
                    {name: self.gradients.get(name, 0) + float(grad.abs().sum())}
                )
            )
        self.weights = {
            name: float_weight(detector.get_submodule(name)).clone() for name in quantized_weights(detector)
        }
        self.hook = next(hook for hook in runner.hooks if isinstance(hook, FilteredGlobalLossHook))
        self.float_state = {key: value.clone() for key, value in self.hook.detector.state_dict().items()}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        detector = runner.model.detector
        SpyHook.records.append(
            dict(
                lr=runner.optim_wrapper.param_groups[0]['lr'],
                outputs=outputs,
                gradients=dict(self.gradients),
                training=any(module.training for module in detector.modules()),
                weights_moved=[
                    name
                    for name, value in self.weights.items()
                    if not torch.equal(value, float_weight(detector.get_submodule(name)))
                ],
                float_moved=[
                    key
                    for key, value in self.hook.detector.state_dict().items()
                    if not torch.equal(value, self.float_state[key])
                ],
                float_quantized=bool(quantized_weights(self.hook.detector)),
                parameters={name: kind for name, kind, _, _ in self.trained},
            )
        )


SPY = {'ptq.global_loss.hooks': [dict(type='SpyHook')]}


def stage_state(work_dir: Path, name: str) -> dict:
    return torch.load(work_dir / 'stages' / f'{name}.pth', weights_only=True)['state']


@pytest.fixture
def spied(make_runner, tmp_path):
    make_runner(SPY).calibrate()
    return SpyHook.records


def test_gradients_reach_every_learnable_parameter_and_nothing_else_moves(spied):
    assert len(spied) == 4
    last = spied[-1]
    kinds = set(last['parameters'].values())
    assert kinds - {'mu'} == {'scale', 'weight_scale', 's', 'k', 'eps', 'bias'}
    without = [name for name in last['parameters'] if not last['gradients'].get(name)]
    assert without == []
    for record in spied:
        assert not record['training']
        assert record['weights_moved'] == [] and record['float_moved'] == []
        assert not record['float_quantized']
        assert {'loss_cls', 'loss_box', 'kept', 'loss'} <= set(record['outputs'])
    rates = [record['lr'] for record in spied]
    assert rates == sorted(rates, reverse=True) and rates[0] > 5 * rates[-1]


@pytest.mark.thorough
def test_the_log_the_scalars_and_the_checkpoints_are_mmengines(finished):
    work_dir = Path(finished.work_dir)
    log = ''.join(file.read_text() for file in work_dir.glob('*/*.log'))
    lines = [line for line in log.splitlines() if 'Iter(train)' in line]
    assert len(lines) == 4
    assert all(f'{key}: ' in line for line in lines for key in ('eta', 'lr', 'loss_cls', 'loss_box', 'kept'))
    assert 'Iter(val)' in log and 'global_loss: ' in log
    scalars = [
        json.loads(line) for file in work_dir.glob('*/vis_data/scalars.json') for line in file.read_text().splitlines()
    ]
    assert sum('loss_box' in entry and 'lr' in entry for entry in scalars) == 4
    names = {file.name for file in work_dir.glob('global/*/*')}
    assert {'iter_4.pth', 'last_checkpoint'} <= names
    assert len([name for name in names if name.startswith('best_global_loss')]) == 1


def test_the_best_held_out_state_is_the_result(make_runner, tmp_path):
    # at this rate several states of this random detector are better than the first
    make_runner(
        {
            'ptq.global_loss.lr': 1e-3,
            'ptq.global_loss.weight_lr': 0.0,
            'ptq.global_loss.iters': 12,
            'ptq.global_loss.val_interval': 4,
        }
    ).calibrate()
    work_dir = tmp_path / 'work_dir'
    best = torch.load(next(work_dir.glob('global/*/best_*.pth')), weights_only=True)['state_dict']
    state = stage_state(work_dir, 'global')
    assert all(torch.equal(value, best[f'detector.{key}']) for key, value in state.items())
    observed = stage_state(work_dir, 'observe')
    assert any(not torch.equal(value, observed[key]) for key, value in state.items())


@pytest.mark.thorough
def test_a_run_that_only_gets_worse_ends_where_it_began(make_runner, tmp_path):
    runner = make_runner({'ptq.global_loss.lr': 2.0, 'ptq.global_loss.iters': 2})
    runner.calibrate()
    observed, state = (stage_state(tmp_path / 'work_dir', name) for name in ('observe', 'global'))
    assert all(torch.equal(value, observed[key]) for key, value in state.items())


@HOOKS.register_module()
class DivergenceHook(Hook):
    """Does to the biases of the box branch what a rate that is too high does."""

    def __init__(self, value: float) -> None:
        self.value = value

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        runner.model.detector.bbox_head.retina_reg.bias.data.fill_(self.value)


@pytest.mark.thorough
@pytest.mark.parametrize('value', [50.0, float('nan')])
def test_a_state_that_ruins_the_boxes_is_not_kept(make_runner, tmp_path, value):
    # no box passes the IoU filter any more, so the loss that is trained is zero
    make_runner(
        {'ptq.global_loss.hooks': [dict(type='DivergenceHook', value=value)], 'ptq.global_loss.iters': 2}
    ).calibrate()
    observed, state = (stage_state(tmp_path / 'work_dir', name) for name in ('observe', 'global'))
    assert all(torch.equal(value, observed[key]) for key, value in state.items())


@pytest.mark.thorough
def test_a_state_whose_scores_are_no_numbers_is_not_kept(make_runner, tmp_path):
    runner = make_runner({'ptq.global_loss.iters': 2})
    run_iter, model_loss, iterations = GlobalCalibrationLoop.run_iter, GlobalLossModel.held_out_loss, []

    def counted(loop, batch):
        iterations.append(loop.iter)
        run_iter(loop, batch)

    def diverged(model, data):
        terms = model_loss(model, data)
        return {key: float('nan') for key in terms} if iterations else terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlobalCalibrationLoop, 'run_iter', counted)
        patch.setattr(GlobalLossModel, 'held_out_loss', diverged)
        runner.calibrate()
    observed, state = (stage_state(tmp_path / 'work_dir', name) for name in ('observe', 'global'))
    assert all(torch.equal(value, observed[key]) for key, value in state.items())
    log = ''.join(file.read_text() for file in (tmp_path / 'work_dir').glob('*/*.log'))
    assert 'the held-out loss after 2 iterations is not finite; that state is not kept' in log


@pytest.mark.thorough
def test_without_held_out_images_the_last_state_is_the_result(make_runner, tmp_path):
    # mmengine's own default is by epochs, of which there are none
    schedule = [dict(type='LinearLR', start_factor=0.1, begin=0, end=2)]
    make_runner(
        {**SPY, 'ptq.global_loss.holdout': 0.0, 'ptq.global_loss.iters': 2, 'ptq.global_loss.param_scheduler': schedule}
    ).calibrate()
    last = torch.load(next((tmp_path / 'work_dir').glob('global/*/iter_2.pth')), weights_only=True)['state_dict']
    state = stage_state(tmp_path / 'work_dir', 'global')
    assert all(torch.equal(value, last[f'detector.{key}']) for key, value in state.items())
    # the user's own scheduler replaces the cosine
    assert SpyHook.records[1]['lr'] > SpyHook.records[0]['lr']


@pytest.mark.thorough
@pytest.mark.parametrize(
    'diverged', [{'lr': 1e30}, {'hooks': [dict(type='DivergenceHook', value=float('nan'))]}], ids=['scales', 'boxes']
)
def test_without_held_out_images_a_state_that_diverged_is_refused(make_runner, tmp_path, diverged):
    changes = {f'ptq.global_loss.{key}': value for key, value in dict(iters=2, holdout=0.0, **diverged).items()}
    with pytest.raises(PTQError, match=r'training diverged; lower `ptq.global_loss.lr`'):
        make_runner(changes).calibrate()
    assert not (tmp_path / 'work_dir' / 'quantized.pth').exists()
    assert not (tmp_path / 'work_dir' / 'stages' / 'global.pth').exists()


RESIZED = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    # where mmdet's own test pipelines have it: boxes stay in pixels of the original image
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]


@pytest.mark.thorough
@pytest.mark.parametrize('target, scale', [('float', 1.0), ('ground_truth', 1.5)])
def test_annotations_are_in_pixels_of_the_network_input_where_they_are_the_target(
    make_runner, config_file, target, scale
):
    runner = make_runner(
        {
            **SPY,
            'ptq.global_loss.target': target,
            'ptq.global_loss.iters': 1,
            'ptq.calibration.num_images': 3,
            'test_dataloader.dataset.pipeline': RESIZED,
        }
    )
    annotations = json.loads((config_file.parent / 'annotations' / 'instances_train.json').read_text())['annotations']
    for position, image_id in enumerate(runner.calibration.ids):
        boxes = [a['bbox'] for a in annotations if a['image_id'] == image_id]
        expected = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]) * scale
        found = runner.calibration[position]['data_samples'].gt_instances.bboxes.tensor
        assert torch.allclose(found, expected)
    assert runner.calibration[0]['inputs'].shape[-2:] == (96, 96)
    runner.calibrate()
    assert float(SpyHook.records[0]['outputs']['loss']) > 0


def test_ground_truth_from_a_folder_of_images_is_refused(make_runner, config_file):
    runner = make_runner({'ptq.global_loss.target': 'ground_truth'})
    runner.ptq.calibration = CalibrationConfig(images=str(config_file.parent / 'train'))
    with pytest.raises(PTQError, match='needs annotations'):
        runner.calibrate()


@pytest.mark.thorough
@pytest.mark.parametrize('target, versions', [('float', 4), ('float', 1), ('ground_truth', 4)])
def test_more_images_are_trained_on_where_the_float_detector_answers(make_runner, target, versions):
    runner = make_runner(
        {'ptq.global_loss.target': target, 'ptq.global_loss.augment': versions, 'ptq.global_loss.iters': 1}
    )
    seen, loader = [], runner.endless_loader

    def spy(dataset, batch_size):
        seen.append(dataset)
        return loader(dataset, batch_size)

    runner.endless_loader = spy
    runner.calibrate()
    (dataset,) = seen
    train = len(runner.calibration) - round(len(runner.calibration) * runner.ptq.global_loss.holdout)
    assert len(dataset) == train * (versions if target == 'float' else 1)
    assert torch.equal(dataset[0]['inputs'], runner.calibration[0]['inputs']) and dataset.seed == runner.seed


def test_rates_say_what_is_trained():
    detector, _ = tiny_quantized(
        'retinanet',
        {
            'preset': 'w8a8_observe',
            'head': 'log_affine',
            'activations': dict(observer=dict(type='mmdet_ptq.MinMaxObserver')),
        },
    )
    scales = {'weight_scale', 's', 'mu'}
    for change, off in (
        (dict(), {'weight'}),
        (dict(grid_lr=0, bias_lr=0, weight_lr=1e-3), {'k', 'eps', 'bias'}),
        (dict(weight_scale_lr=0, weight_lr=1e-3), scales),
    ):
        train_only_quantization(detector, GlobalLossConfig(**change).rates())
        kinds = {True: set(), False: set()}
        for _, kind, parameter, _ in learnable_parameters(detector):
            kinds[parameter.requires_grad].add(kind)
        assert kinds[False] - {'mu'} == off - {'mu'} and not kinds[True] & off
        assert 'scale' in kinds[True] and ('s' in kinds[True]) == ('s' not in off)
        trained = {id(p) for p in detector.parameters() if p.requires_grad}
        assert trained == {id(p) for _, kind, p, _ in learnable_parameters(detector) if kind not in off}
