"""What mmengine cannot build for the global stage is said before any stage runs."""

from __future__ import annotations

import pytest
from mmengine.registry import DefaultScope

from mmdet_ptq import PTQError
from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.engine.global_stage.optim import QuantizationParamsConstructor
from mmdet_ptq.engine.global_stage.rehearsal import check_holdout, rehearse_global

BAD = [
    (dict(optim_wrapper=dict(optimizer=dict(type='Adm'))), ['optim_wrapper.optimizer.type` is ', "'Adam'"]),
    (dict(optim_wrapper=dict(type='OptimWraper')), ['optim_wrapper.type` is ', "'OptimWrapper'"]),
    (dict(optim_wrapper=dict(optimizer=dict(type='SGD', momentun=0.9))), ['optim_wrapper` cannot', 'momentun']),
    (dict(optim_wrapper=dict(optimizer='Adam')), ['optim_wrapper.optimizer` must be a dict']),
    (dict(optim_wrapper=dict(paramwise_cfg=dict(bias_lr_mult=2))), ['optim_wrapper.paramwise_cfg`', '`bias_lr`']),
    (dict(param_scheduler=[dict(type='CosineAnealingLR')]), ['param_scheduler[0].type` is ', "'CosineAnnealingLR'"]),
    (dict(param_scheduler=[dict(type='StepLR', by_epoch=False)]), ['param_scheduler[0]` cannot', 'step_size']),
    (dict(param_scheduler=[dict(type='StepLR', step_size=1, by_epoch=True)]), ['param_scheduler[0].by_epoch` must be']),
    (dict(param_scheduler=[dict(by_epoch=False)]), ['param_scheduler[0]` must be a dict with a `type`']),
    (dict(hooks=[dict(type='EMAHok')]), ['hooks[0].type` is ', "'EMAHook'"]),
    (dict(hooks=[dict(type='ProfilerHook', unknown=1)]), ['hooks[0]` cannot be built', 'unknown']),
    (dict(holdout=0.95), ['holdout` leaves none of the 8']),
]


@pytest.mark.parametrize(('section', 'words'), BAD, ids=[' '.join(words) for _, words in BAD])
def test_what_cannot_be_built_is_named(section, words):
    with pytest.raises(PTQError) as error:
        rehearse_global(GlobalLossConfig(**section), images=8)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    'section',
    [
        dict(),
        dict(optim_wrapper=dict(accumulative_counts=2)),
        dict(optim_wrapper=dict(optimizer=dict(type='SGD'))),
        dict(param_scheduler=[dict(type='LinearLR', convert_to_iter_based=True, start_factor=0.1)]),
        dict(hooks=[dict(type='NumClassCheckHook', priority='LOW')]),
    ],
    ids=str,
)
def test_what_can_be_built_passes_and_stays_as_it_is(section):
    cfg = GlobalLossConfig(**section)
    with DefaultScope.overwrite_default_scope('mmdet'):
        rehearse_global(cfg, images=8)
    assert cfg == GlobalLossConfig(**section)


def test_a_share_that_leaves_nothing_to_train_on_is_refused_by_the_reconstruction_too(make_runner, tmp_path):
    runner = make_runner({'ptq.reconstruct': dict(iters=0, holdout=0.95), 'ptq.calibration.num_images': 3})
    with pytest.raises(PTQError, match='`ptq.reconstruct.holdout` leaves none of the 3 calibration images'):
        runner.calibrate()
    assert not list((tmp_path / 'work_dir').glob('stages/*'))


def test_a_share_that_holds_nothing_out_is_told_with_the_images_needed(monkeypatch):
    told = []
    monkeypatch.setattr(
        'mmdet_ptq.engine.global_stage.rehearsal.print_log', lambda text, *args, **kwargs: told.append(text)
    )
    for images in (4, 5):
        check_holdout('ptq.reconstruct', 0.125, images)
    check_holdout('ptq.reconstruct', 0.0, 4)
    assert len(told) == 1 and 'holds out none of 4' in told[0] and '; 5 are needed' in told[0]


def test_the_run_says_so_before_any_stage(make_runner, tmp_path):
    runner = make_runner({'ptq.global_loss.optim_wrapper': dict(type='OptimWrapper', optimizer=dict(type='Adm'))})
    with pytest.raises(PTQError, match=r'Did you mean .*Adam'):
        runner.calibrate()
    assert not list((tmp_path / 'work_dir').glob('stages/*'))


@pytest.mark.thorough
def test_a_wrapper_without_optimizer_trains_with_adam(make_runner, monkeypatch):
    built, build = [], QuantizationParamsConstructor.__call__
    monkeypatch.setattr(
        QuantizationParamsConstructor, '__call__', lambda self, model: built.append(build(self, model)) or built[-1]
    )
    runner = make_runner(
        {
            'ptq.global_loss.optim_wrapper': dict(type='OptimWrapper', clip_grad=dict(max_norm=1.0)),
            'ptq.global_loss.iters': 2,
        }
    )
    runner.calibrate()
    (wrapper,) = built
    assert type(wrapper.optimizer).__name__ == 'Adam'
    assert wrapper.clip_grad_kwargs == dict(max_norm=1.0)
