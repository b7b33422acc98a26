"""From a config to the runner's arguments: what only training needs is left out, and what is missing is told."""

import pytest
from mmengine.config import Config

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.engine.arguments import runner_arguments
from mmdet_ptq.errors import PTQError


def config(**changes):
    return Config(
        dict(
            ptq=dict(preset='w8a8_observe'),
            load_from='float.pth',
            work_dir='work',
            model=dict(type='Own', backbone=dict(norm_cfg=dict(type='SyncBN'))),
            test_dataloader=dict(batch_size=1, dataset=dict(type='CocoDataset')),
            test_evaluator=dict(type='CocoMetric'),
            **changes,
        )
    )


def without(key, **changes):
    cfg = config(**changes)
    cfg.pop(key)
    return cfg


def test_what_the_runner_needs_is_handed_on():
    cfg = config(
        data_preprocessor=dict(type='DetDataPreprocessor'),
        resume=True,
        randomness=dict(seed=3),
        experiment_name='name',
        train_dataloader=dict(batch_size=2),
        optim_wrapper=dict(type='OptimWrapper'),
        train_cfg=dict(max_epochs=12),
    )
    found = runner_arguments(cfg)
    assert found['ptq'] == PTQConfig.from_dict(dict(preset='w8a8_observe'))
    for key in (
        'load_from',
        'resume',
        'randomness',
        'experiment_name',
        'data_preprocessor',
        'test_evaluator',
        'work_dir',
    ):
        assert found[key] == cfg[key], key
    assert not {'train_dataloader', 'optim_wrapper', 'train_cfg', 'val_dataloader'} & found.keys()


def test_what_a_config_does_not_say_has_a_default():
    found = runner_arguments(config())
    assert found['resume'] is False and found['data_preprocessor'] is found['randomness'] is None
    assert (found['launcher'], found['default_scope']) == ('none', 'mmdet')


def test_two_runs_of_one_second_have_names_of_their_own():
    names = [runner_arguments(config())['experiment_name'] for _ in range(2)]
    assert names[0] != names[1] and all(name.startswith('ptq_') for name in names)


def test_the_config_stays_as_it_was():
    cfg = config()
    before = cfg.to_dict()
    found = runner_arguments(cfg)
    assert found['model']['backbone']['norm_cfg']['type'] == 'BN' and cfg.to_dict() == before
    found['model']['backbone']['depth'] = 50
    assert cfg.to_dict() == before


@pytest.mark.parametrize(
    ('cfg', 'told'),
    [
        (without('ptq'), 'no `ptq` block'),
        (without('load_from'), '^no float checkpoint is named; give CHECKPOINT on the command line or set `load_from`'),
        (without('test_dataloader'), '^the config has no `test_dataloader`, which the report is made with'),
        (without('test_evaluator'), '^the config has no `test_evaluator`'),
        (without('test_evaluator', default_hooks=[]), '^`default_hooks` must be a dict'),
        (without('model', env_cfg='gpu'), "^`env_cfg` must be a dict, got 'gpu'"),
        (config(custom_hooks=dict(type='EMAHook')), '^`custom_hooks` must be a list of hooks'),
    ],
)
def test_what_is_missing_or_of_another_form_is_told(cfg, told):
    with pytest.raises(PTQError, match=told):
        runner_arguments(cfg)


def test_hooks_of_the_training_are_named_by_their_types(monkeypatch):
    lines = []
    monkeypatch.setattr('mmdet_ptq.engine.arguments.print_log', lambda text, *_: lines.append(text))
    found = runner_arguments(config(custom_hooks=[dict(type='EMAHook', momentum=0.1), dict(type=dict)]))
    assert lines == ["custom_hooks belong to training and are not used: EMAHook, <class 'dict'>"]
    assert [hook['type'] for hook in found['custom_hooks']] == ['mmdet_ptq.ProgressHook']
    runner_arguments(config(custom_hooks=[]))
    assert len(lines) == 1
