"""ablation.py and overhead.py on a tiny detector."""

import json

import pytest
from benchmark_tools import BENCHMARKS, module, read

from mmdet_ptq.deploy import quantized_state, save_quantized
from mmdet_ptq.testing import tiny_quantized
from mmdet_ptq.testing.models import tiny_model_cfg

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


def test_recipes_share_what_precedes_the_global_loss(tmp_path):
    ablation = module('ablation')
    local, trained, other = (
        ablation.before_global(ablation.RECIPES[name])
        for name in ('ours, best format a layer, local', 'ours', 'ours, uniform, local')
    )
    assert local == trained != other
    first, second, third = (tmp_path / name for name in ('first', 'second', 'third'))
    finished = {}
    ablation.begin_with(first, finished, local)
    (first / 'stages').mkdir(parents=True)
    for stage in ('observe', 'reconstruct', 'global', 'evaluate'):
        (first / 'stages' / f'{stage}.pth').write_text(stage)
    ablation.begin_with(second, finished, trained)
    ablation.begin_with(third, finished, other)
    assert sorted(path.stem for path in (second / 'stages').iterdir()) == ['observe', 'reconstruct']
    assert not third.exists()
    # what it has already stays
    (second / 'stages' / 'observe.pth').write_text('its own')
    ablation.begin_with(second, finished, trained)
    assert (second / 'stages' / 'observe.pth').read_text() == 'its own'


def test_a_seed_is_of_the_images_and_of_the_training(tmp_path, monkeypatch):
    runs, given = module('runs'), []
    row = dict(metrics={'coco/bbox_mAP': 0.5}, size_bytes=1)
    results = dict(
        rows=[dict(row, model='float'), dict(row, model='simulated')],
        stages={},
        seed=2,
        date='2026-01-01',
        coverage=dict(integer_mac_share=1.0),
        calibration=dict(num_images=3),
        versions={},
    )
    monkeypatch.setattr(runs, 'run_ptq', lambda *args: (given.append(args), (['', '', '--preset', 'w4a4'], results))[1])
    ablation, compared = module('ablation'), []
    monkeypatch.setattr(ablation, 'compare_pairs', lambda *args: compared.append(args))
    ablation.main(
        [
            str(tmp_path / 'tiny.py'),
            '--bits',
            'w4a4',
            '--recipes',
            'ours',
            'rounding',
            '--seeds',
            '0',
            '2',
            '--out',
            str(tmp_path / 'out.csv'),
            '--work-dir',
            str(tmp_path / 'work'),
        ]
    )
    assert [list(args[4]) for args in given] == [[], [], ['--seed', '2'], ['--seed', '2']]
    assert len({args[2] for args in given}) == 4
    assert '--preset w4a4 --seed 2 --cfg-options ptq.reconstruct=None' in read(tmp_path / 'out.csv')[3]['command']
    ((folders, against, seeds, out),) = compared
    assert (against, seeds, out) == ('ours', 2, tmp_path / 'out_pairs.csv')
    assert folders == {
        ('tiny', 'w4a4', recipe): [given[index][2] for index in places]
        for recipe, places in (('ours', (0, 2)), ('rounding', (1, 3)))
    }


def test_shortened_recipes_say_so():
    ablation = module('ablation')
    assert ablation.shortened(ablation.RECIPES['ours'], 300, None) == ([], '')
    assert ablation.shortened(ablation.RECIPES['ours'], 300, 100) == (['ptq.global_loss.iters=100'], ' (100 steps)')
    options, told = ablation.shortened(ablation.RECIPES['qdrop'], 300, 100)
    assert 'ptq.reconstruct.iters=300' in options and told == ' (300 iterations)'
    # as published, and raised where the rounding could not move otherwise
    assert [ablation.rounding_rate(iters) for iters in (20000, 10000, 300)] == [1e-3, 2e-3, 1e-2]
    assert 'ptq.reconstruct.rounding_lr=0.01' in options
    for name in ('rounding', 'ours, uniform, local'):
        assert ablation.shortened(ablation.RECIPES[name], 300, 100) == (list(ablation.RECIPES[name]), '')


def test_cost_of_simulation_is_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'quantized.pth'
    detector, structure = tiny_quantized('retinanet')
    save_quantized(path, quantized_state(detector, structure, dict(model=tiny_model_cfg('retinanet')), None))
    monkeypatch.setattr(
        'sys.argv',
        [
            str(BENCHMARKS / 'overhead.py'),
            str(path),
            '--size',
            '512',
            '512',
            '--batch-size',
            '4',
            '--pairs',
            '1',
            '--threads',
            '1',
        ],
    )
    capsys.readouterr()  # what the preparation logged
    module('overhead').main()
    measured = json.loads(capsys.readouterr().out)
    assert measured['forward_simulated_over_float']['ratio'] > 0
    assert measured['memory_bytes']['train'] > 0 and measured['memory_bytes']['calibrate'] > 0
