"""The last words of a run."""

from pathlib import Path

import pytest

from mmdet_ptq.analysis import verdict_lines
from mmdet_ptq.analysis.verdict import running_program, shipped_row

METRIC = 'coco/bbox_mAP'
CHECKPOINT = Path('out/quantized.pth')


@pytest.fixture
def run(results):
    """Results whose rows lose so many points at such a speed, and where their models lie."""

    def make(**rows):
        first = dict(results['rows'][0], metrics={METRIC: 0.5}, size_bytes=4_200_000, latency_ratio=None, remark='')
        made = [first, dict(first, model='simulated', size_bytes=1_100_000)]
        for name, (change, ratio, remark) in rows.items():
            metrics = {METRIC: 0.5 + change / 100}
            made.append(
                dict(first, model=name, metrics=metrics, size_bytes=1_200_000, latency_ratio=ratio, remark=remark)
            )
        given = dict(results, rows=made, evaluation=dict(num_images=250), versions=dict(processor='a processor'))
        return given, {name: [Path('out') / name / 'model.bin'] for name in rows}

    return make


def test_gain_cost_and_the_file_to_ship_are_told(run):
    results, models = run(fast=(-0.1, 1.5, ''))
    gained, cost, processor, ship, *_ = verdict_lines(results, models, CHECKPOINT)
    assert gained == (
        'gained: 1.2 MB instead of 4.2 MB, 3.5 times smaller; 1.50 times as fast as float in fast '
        '(one thread, one image at a time, this processor)'
    )
    assert cost == 'cost: coco/bbox_mAP 0.500 -> 0.499 (-0.1 points), fast on 250 images'
    assert processor.startswith('on this processor (a processor): nothing is known')
    assert ship == 'ship: out/fast/model.bin'
    models['fast'].append(Path('out/fast/weights.bin'))
    assert verdict_lines(results, models, CHECKPOINT)[3] == f'{ship}, with weights.bin beside it'


def test_the_program_beside_the_model_is_shown_before_mmdets(run):
    results, models = run(fast=(-0.1, 1.5, ''), other=(0.0, 1.1, ''))
    programs = dict(fast=Path('my out/fast/detect.py'), other=Path('out/other/detect.py'))
    *_, alone, in_mmdet, _, _, _ = verdict_lines(results, models, CHECKPOINT, 'a.png', programs)
    assert alone == "run it without mmdet: python 'my out/fast/detect.py' a.png" and in_mmdet == 'run it in mmdet:'
    *_, ship, in_mmdet, _, _, _ = verdict_lines(results, models, CHECKPOINT, 'a.png', dict(other=programs['other']))
    assert ship.startswith('ship: ') and in_mmdet == 'run it:'


def test_a_slower_model_is_called_slower(run):
    results, models = run(slow=(0.0, 0.8, ''))
    assert 'but slower: 0.80 times the speed of float in slow' in verdict_lines(results, models, CHECKPOINT)[0]


@pytest.mark.parametrize(
    ('rows', 'shipped'),
    [
        (dict(a=(0.0, 1.1, ''), b=(-0.3, 1.9, '')), 'b'),
        (dict(a=(0.0, 1.1, ''), b=(-2.0, 1.9, '')), 'a'),
        (dict(a=(-9.0, 1.1, ''), b=(-2.0, 0.9, '')), 'b'),
        (dict(a=(0.0, 1.1, ''), b=(0.0, 1.9, 'wrong here')), 'a'),
        (dict(a=(0.9, 1.1, ''), b=(0.0, 1.9, '')), 'b'),
        (dict(a=(0.0, 1.1, 'wrong here')), None),
        (dict(), None),
    ],
)
def test_the_fastest_that_costs_little_and_is_right_is_shipped(run, rows, shipped):
    row = shipped_row(*run(**rows))
    assert (row and row['model']) == shipped


def test_without_a_model_to_ship_it_says_why(run):
    results, models = run()
    told = verdict_lines(results, models, CHECKPOINT)
    assert 'no speed, which only exported models have' in told[0]
    assert any('ship: nothing yet, nothing was exported' in line for line in told)
    assert any("load_quantized('out/quantized.pth')" in line for line in told)
    results, models = run(odd=(0.0, 1.1, 'wrong here'))
    told = '\n'.join(verdict_lines(results, models, CHECKPOINT))
    assert 'the figures of odd are wrong on this processor' in told and 'nothing is known' not in told


def test_an_evaluation_without_figures(run):
    results, models = run(fast=(0.0, 1.5, ''))
    for row in results['rows']:
        row['metrics'] = {METRIC: -1}
    assert verdict_lines(results, models, CHECKPOINT)[1] == 'cost: unknown, the evaluation gives no figures'


def test_the_program_is_three_lines_of_python():
    program = running_program(Path("a'b/model.onnx"), True, 'config.py', None)
    assert len(program) == 3
    compile('\n'.join(program), 'program', 'exec')
