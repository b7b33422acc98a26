import io

import pytest
from rich.console import Console

from mmdet_ptq.analysis import headline_metric, print_results, result_lines
from mmdet_ptq.analysis.figures import points
from mmdet_ptq.analysis.table import format_bytes, format_count


def shown(printable):
    console = Console(file=io.StringIO(), width=200)
    console.print(printable)
    return console.file.getvalue()


def test_lines(results):
    lines = {line.label: (line.values, line.changes) for line in result_lines(results)}
    assert list(lines)[:3] == list(results['rows'][0]['metrics'])
    assert lines['coco/bbox_mAP'] == (['0.412', '0.400', '0.400'], ['', '-1.2', '-1.2'])
    assert lines['coco/bbox_mAP_50'][1] == ['', '+1.0', '+1.0']
    assert lines['coco/bbox_mAP_s'] == (['-', '-', '-'], ['', '-', '-'])
    assert lines['size'][1] == ['', '4.00x less', '4.00x less']
    assert lines['bit operations'][1] == ['', '16.00x less', '16.00x less']
    assert lines['speed against float'][0] == ['-', '-', '1.80x']


def test_metrics_of_any_row_are_listed(results):
    results['rows'][2]['metrics'] = {'own/metric': 3.5, 'own/text': '0.1 0.2'}
    lines = {line.label: line for line in result_lines(results)}
    assert lines['own/metric'].values == ['-', '-', '3.500']
    assert lines['own/text'].values == ['-', '-', '0.1 0.2']
    assert lines['coco/bbox_mAP'].values == ['0.412', '0.400', '-']


def test_a_difference_of_nothing_has_no_sign_of_loss(results):
    results['rows'][1]['metrics']['coco/bbox_mAP'] = 0.4119
    assert result_lines(results)[0].changes[1] == '+0.0'


def test_print_results_shows_every_figure(results):
    console = Console(file=io.StringIO(), width=200)
    print_results(results, console)
    text = console.file.getvalue()
    for row in results['rows']:
        assert row['model'] in text
    lines = result_lines(results)
    assert len(results['rows']) > 2 and len(lines) > 4
    for line in lines:
        # of runtimes, a second table shows the headline figure, size and speed
        assert all(value in text for value in line.values[:2])
    assert lines[0].values[2] in text and lines[0].changes[2] in text


def test_what_a_runtime_computes_in_integers_is_counted(results):
    name = results['rows'][2]['model']
    results['runtimes'] = {name: dict(integer=['a', 'b', 'c'], float=['d'])}
    console = Console(file=io.StringIO(), width=120)
    print_results(results, console)
    line = next(line for line in console.file.getvalue().splitlines() if name in line)
    assert '3 of 4' in line


def test_on_a_narrow_terminal_no_name_loses_its_end(results):
    console = Console(file=io.StringIO(), width=60)
    print_results(results, console)
    lines = console.file.getvalue().splitlines()
    assert '…' not in console.file.getvalue()
    assert max(len(line) for line in lines if line[:1] in '┏┃┡│└') <= 60


def test_print_results_of_a_run_without_rows(results):
    console = Console(file=io.StringIO())
    print_results(dict(results, rows=[]), console)
    assert 'results' in console.file.getvalue()


@pytest.mark.parametrize(
    ('metrics', 'expected'),
    [
        ({'coco/bbox_mAP_50': 0.5, 'coco/bbox_mAP': 0.3}, 'coco/bbox_mAP'),
        ({'pascal_voc/AP50': 0.2, 'x/AP': 0.1}, 'x/AP'),
        ({'a': -1, 'b': 0.2}, 'b'),
        ({'a': 'text'}, None),
        ({}, None),
    ],
)
def test_headline_metric(metrics, expected):
    assert headline_metric({'rows': [{'metrics': metrics}]}) == expected
    assert headline_metric({'rows': []}) is None


def test_points():
    assert points(0.329, 0.307) == pytest.approx(-2.2)
    assert points(45.0, 44.0) == -1.0


@pytest.mark.parametrize(
    ('size', 'text'), [(0, '0 B'), (999, '999 B'), (1000, '1.0 kB'), (999_960, '1.0 MB'), (3_700_000, '3.7 MB')]
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text


def test_format_count():
    assert format_count(12) == '12'
    assert format_count(33_400_000_000) == '33.4 G'


def test_figures_that_the_processor_makes_wrong_are_marked(results):
    results['rows'][2]['remark'] = 'ncnn: this processor lacks something, [so] calibrate again.'
    console = Console(file=io.StringIO(), width=200)
    print_results(results, console)
    text = console.file.getvalue()
    name = f'{results["rows"][2]["model"]} (!)'
    assert text.count(name) == 2 and f'{name}: {results["rows"][2]["remark"]}' in text
