"""The results and the coverage as tables: plain cells, and the same on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from mmdet_ptq.analysis.advice import closing_lines
from mmdet_ptq.analysis.figures import headline_metric, metric_value, model_name, points
from mmdet_ptq.progress import output

ABSENT = '-'


@dataclass
class ResultLine:
    """One figure of all models.

    Attributes:
        label: Name of the figure.
        metric: Whether it is the evaluator's; a cost otherwise.
        values: The figure of each model, as text.
        changes: Its difference to the first model, as text; empty for the first model itself.
    """

    label: str
    metric: bool
    values: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def result_lines(results: Mapping[str, Any]) -> list[ResultLine]:
    """Every figure of the evaluator, then size, bit operations and latency, one line each.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`. The first row is what the others are
            compared to.
    """
    rows = results['rows']
    names = list(dict.fromkeys(name for row in rows for name in row['metrics']))
    lines = [_metric_line(name, [row['metrics'].get(name) for row in rows]) for name in names]
    lines.append(_cost_line('size', [row['size_bytes'] for row in rows], format_bytes))
    lines.append(_cost_line('bit operations', [row['bops'] for row in rows], format_count))
    speeds = [row['latency_ratio'] for row in rows]
    if any(speed is not None for speed in speeds):
        shown = [ABSENT if speed is None else f'{speed:.2f}x' for speed in speeds]
        lines.append(ResultLine('speed against float', False, shown, [''] * len(speeds)))
    return lines


def _metric_line(name: str, raw: list[Any]) -> ResultLine:
    values = [metric_value(value) for value in raw]
    line = ResultLine(name, True)
    for given, value in zip(raw, values, strict=True):
        line.values.append(given if isinstance(given, str) else ABSENT if value is None else f'{value:.3f}')
        known = value is not None and values[0] is not None
        # + 0.0 turns a difference that rounds to nothing into +0.0 instead of -0.0
        line.changes.append(f'{round(points(values[0], value), 1) + 0.0:+.1f}' if known else ABSENT)
    line.changes[:1] = ['']
    return line


def _cost_line(name: str, costs: list[int | None], show) -> ResultLine:
    line = ResultLine(name, False)
    for cost in costs:
        line.values.append(ABSENT if cost is None else show(cost))
        line.changes.append(f'{costs[0] / cost:.2f}x less' if cost and costs[0] else ABSENT)
    line.changes[:1] = ['']
    return line


def format_bytes(size: int) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    return _scaled(size, ('B', 'kB', 'MB', 'GB', 'TB'))


def format_count(count: int) -> str:
    """A count with the usual decimal prefix (k, M, G, T, P)."""
    return _scaled(count, ('', 'k', 'M', 'G', 'T', 'P')).rstrip()


def _scaled(value: float, units: tuple[str, ...]) -> str:
    place = 0
    # 999.95 is written as 1000.0
    while value >= 999.95 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return f'{value:.1f} {units[place]}' if place else f'{value:.0f} {units[0]}'


def results_table(results: Mapping[str, Any]) -> Table:
    """The first two models as a terminal table: a line per figure, a column per model and its difference.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
    """
    results = {**results, 'rows': results['rows'][:2]}
    table = Table(title='results', caption='differences to float: metrics in points, costs as ratios')
    table.add_column('figure', no_wrap=True)
    for place, row in enumerate(results['rows']):
        table.add_column(model_name(row), justify='right', no_wrap=True)
        if place:
            table.add_column('difference', justify='right', no_wrap=True)
    lines = result_lines(results) if results['rows'] else []
    metrics = sum(line.metric for line in lines)
    for place, line in enumerate(lines, 1):
        cells = [cell for pair in zip(line.values, line.changes, strict=True) for cell in pair]
        del cells[1]  # the first model has no difference to itself
        table.add_row(line.label, *cells, end_section=place == metrics)
    return table


def models_table(results: Mapping[str, Any]) -> Table:
    """Every model as a line of a terminal table: headline figure, size, speed, what computes in integers.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
    """
    metric = headline_metric(results)
    table = Table(title='models')
    table.add_column('model', no_wrap=True)
    for heading in (metric or 'metric', 'points', 'size', 'ms', 'speed', 'integer convolutions'):
        # on a narrow terminal two lines, not a name without its end
        table.add_column(heading, justify='right', overflow='fold')
    for line in model_lines(results):
        table.add_row(line.name, line.metric, line.points, line.size, line.time, line.speed, line.integer)
    return table


@dataclass
class ModelLine:
    """One model with what decides about it.

    Attributes:
        name: Its name, marked where its figures are wrong on this processor.
        metric: Its headline figure.
        points: The difference to the first model; '' for that one.
        size: Bytes of its files.
        time: Milliseconds of one run, of the float model in the same runtime and of this one.
        speed: The ratio of both.
        integer: How many of its convolutions compute in integers.
        worse: Whether it lost points.
        slower: Whether it is slower than float.
    """

    name: str
    metric: str
    points: str
    size: str
    time: str
    speed: str
    integer: str
    worse: bool
    slower: bool


def model_lines(results: Mapping[str, Any]) -> list[ModelLine]:
    """Every model as a line.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
    """
    if not results['rows']:
        return []
    lines, metric = {line.label: line for line in result_lines(results)}, headline_metric(results)
    found = []
    for place, row in enumerate(results['rows']):
        coverage, ratio, latency = (
            results.get('runtimes', {}).get(row['model']),
            row['latency_ratio'],
            row.get('latency'),
        )
        change = lines[metric].changes[place] if metric else ABSENT
        found.append(
            ModelLine(
                model_name(row),
                lines[metric].values[place] if metric else ABSENT,
                change,
                lines['size'].values[place],
                f'{latency["float_ms"]:.1f} → {latency["ms"]:.1f}' if latency else ABSENT,
                ABSENT if ratio is None else f'{ratio:.2f}x',
                f'{len(coverage["integer"])} of {len(coverage["integer"]) + len(coverage["float"])}'
                if coverage
                else '',
                change.startswith('-') and change != ABSENT,
                ratio is not None and ratio < 1,
            )
        )
    return found


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the results table, where there are more than two models a table of all, and what one must know of them.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
        console: Where to. Defaults to the terminal.
    """
    console = console or output()
    console.print(results_table(results))
    if len(results['rows']) > 2:
        console.print(models_table(results))
    print_lines(closing_lines(results), console, 'yellow')


def print_lines(lines: Iterable[str], console: Console | None = None, style: str | None = None) -> None:
    """Prints lines as they are: a name in one is not split, and can be copied.

    Args:
        lines: The lines.
        console: Where to. Defaults to the terminal.
        style: Their colour. Defaults to None.
    """
    console = console or output()
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
