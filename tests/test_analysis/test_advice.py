import pytest

from mmdet_ptq.analysis import closing_lines


@pytest.fixture
def quiet(results):
    """Nothing to say: enough images, no loss, all in integers."""
    first = results['rows'][0]
    coverage = dict(integer_mac_share=1.0, layers=[dict(name='conv', macs=5, integer=True)])
    return dict(results, rows=[first], evaluation=dict(num_images=5000), coverage=coverage)


def timed(results, **ratios):
    first = results['rows'][0]
    others = [dict(first, model=name, latency_ratio=ratio) for name, ratio in ratios.items()]
    return dict(results, rows=[first, *others])


def losing(results, **changes):
    """Rows that differ from float by so many points."""
    first = results['rows'][0]
    metric = 'coco/bbox_mAP'
    rows = [
        dict(first, model=name, metrics={metric: first['metrics'][metric] + change / 100})
        for name, change in changes.items()
    ]
    return dict(results, rows=[first, *rows])


def test_nothing_is_said_where_there_is_nothing_to_say(quiet):
    assert closing_lines(quiet) == []
    for row in quiet['rows']:  # of older versions
        row.pop('remark', None)
    assert closing_lines({key: quiet[key] for key in ('rows', 'recipe')}) == []


@pytest.mark.parametrize(
    'ratios,told',
    [
        (dict(onnxruntime=1.4, openvino=1.1), None),
        (
            dict(onnxruntime=0.64, openvino=1.18, ncnn=1.02),
            'int8 is slower than float in onnxruntime (0.64x); openvino is faster here (1.18x).',
        ),
        (
            dict(onnxruntime=0.64, openvino=0.9),
            'int8 is slower than float in onnxruntime (0.64x) and openvino (0.90x); no exported '
            'runtime whose figures are right is faster here.',
        ),
    ],
)
def test_integers_that_do_not_pay_are_told(quiet, ratios, told):
    lines = closing_lines(timed(quiet, **ratios))
    assert lines == ([] if told is None else [f'on this processor {told}'])


def test_a_runtime_whose_figures_are_wrong_is_not_recommended(quiet):
    given = timed(quiet, onnxruntime=0.64, openvino=1.18)
    given['rows'][2]['remark'] = 'wrong'
    assert closing_lines(given)[-1].endswith('no exported runtime whose figures are right is faster here.')


def test_few_images_and_float_layers_are_told(quiet):
    quiet['evaluation']['num_images'] = 177
    quiet['coverage'] = dict(
        integer_mac_share=0.875,
        layers=[dict(name=name, macs=5, integer=name == 'a') for name in 'abcdef']
        + [dict(name='idle', macs=0, integer=False)],
    )
    images, left = closing_lines(quiet)
    assert '177 images' in images
    assert left.startswith('12.50% of the multiply-accumulates stay float: b, c, d and 2 more;')


def test_a_loss_comes_with_what_to_try_in_order(quiet):
    recipe = dict(
        dataflow='balanced', calibration=dict(num_images=128), reconstruct=None, global_loss=None, protect=None
    )
    given = losing(dict(quiet, recipe=recipe), simulated=-2.64, onnxruntime=-2.6, openvino=-0.3)
    first, *steps = closing_lines(given)
    assert first.startswith('integers cost more than 0.5 points: simulated -2.6, onnxruntime -2.6. To try next')
    assert 'keep `ptq.export`' in first
    assert [step.split(' ')[2] for step in steps] == [f'{place}.' for place in range(1, 8)]
    wanted = (
        'dataflow=accuracy',
        'num_images=512',
        'rounding=compensated',
        'closed_form',
        'w8a8',
        'protect.max_tensors',
        'troubleshoot',
    )
    for step, told in zip(steps, wanted, strict=True):
        assert told in step
    told = closing_lines(dict(given, recipe={**recipe, 'rounding': 'compensated'}))
    assert len(told) == 7 and not any('rounding' in line for line in told)
    settled = dict(dataflow='accuracy', calibration=dict(num_images=512), reconstruct={}, global_loss={}, protect={})
    given['recipe'] = settled
    assert len(closing_lines(given)) == 2
    assert closing_lines(losing(dict(quiet, recipe=settled), simulated=-0.4)) == []
