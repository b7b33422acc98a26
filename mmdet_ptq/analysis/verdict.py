"""The last words of a run: what was gained, what it cost, which file to ship and how to run it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mmdet_ptq.analysis.advice import MUCH
from mmdet_ptq.analysis.figures import headline_metric, metric_value, points
from mmdet_ptq.analysis.table import format_bytes


def verdict_lines(
    results: Mapping[str, Any],
    models: Mapping[str, Sequence[Path]],
    checkpoint: Path,
    image: str | None = None,
    programs: Mapping[str, Path] = MappingProxyType({}),
) -> list[str]:
    """What a person needs to decide, in plain words.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
        models: Row to the files of its exported model, the one that is opened first.
        checkpoint: The integer checkpoint, which mmdet runs.
        image: An image file for the program that is shown. Defaults to None: a made-up name.
        programs: Row to the program that detects with its model and without mmdet. Defaults to none.
    """
    first, *others = results['rows']
    row = shipped_row(results, models)
    if row is None:
        wrong = [other['model'] for other in others if other['model'] in models]
        why = (
            f'the figures of {" and ".join(wrong)} are wrong on this processor'
            if wrong
            else 'nothing was exported (`ptq.export`)'
        )
        row = others[0] if others else first
        told = [f'ship: nothing yet, {why}; {checkpoint} is for mmdet, which computes what integers would, and slower']
    else:
        first_file, *beside = models[row['model']]
        names = ' and '.join(path.name for path in beside)
        told = [f'ship: {first_file}' + (f', with {names} beside it' if beside else '')]
    lines = [f'gained: {_gain(first, row)}', f'cost: {_cost(results, row)}']
    if not any(other.get('remark') for other in others):
        processor = results.get('versions', {}).get('processor', 'unknown')
        lines.append(f'on this processor ({processor}): nothing is known that makes these figures wrong')
    exported = row['model'] in models
    path = models[row['model']][0] if exported else checkpoint
    program = running_program(path, exported, results['config'] or 'config.py', image)
    if alone := programs.get(row['model']):
        told.append(f'run it without mmdet: python {shlex.quote(str(alone))} {shlex.quote(image or "image.jpg")}')
    return [*lines, *told, 'run it in mmdet:' if alone else 'run it:', *(f'    {line}' for line in program)]


def verdict(results: Mapping[str, Any]) -> str:
    """The whole run in one sentence: whether to ship, what, at what cost and for what gain.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
    """
    first, *others = results['rows'] or [None]
    if not others:
        return 'Nothing to decide yet: no quantized model has been evaluated.'
    row = shipped_row(results, [other['model'] for other in others if other['latency_ratio'] is not None])
    if row is None:
        wrong = any(other.get('remark') for other in others)
        why = 'the figures of its runtimes are wrong on this processor' if wrong else 'no runtime has been evaluated'
        return f'Nothing to ship yet: {why}; {_cost(results, others[0])}.'
    change, ratio = _change(results, row), row['latency_ratio']
    smaller = f'{first["size_bytes"] / row["size_bytes"]:.1f} times smaller'
    gain = f'it is {smaller} and runs at {ratio:.2f} times the speed of float'
    cost = _cost(results, row).replace(f', {row["model"]}', '')
    if change is None:
        return f'{row["model"]} runs, and what it costs is unknown: the evaluation gives no figures; {gain}.'
    low, high = _interval(results, row) or (change, change)
    if high < -MUCH:
        return f'Not yet, integers cost too much: {cost}; {gain}.'
    advice = f'Keep float here, unless size counts: {row["model"]} is slower' if ratio < 1 else f'Ship {row["model"]}'
    doubt = '; the images are too few to tell a loss that matters from none' if low < -MUCH else ''
    return f'{advice}: {cost}, {gain}{doubt}.'


def shipped_row(results: Mapping[str, Any], models: Collection[str]) -> Mapping[str, Any] | None:
    """The row of the model to ship: right on this processor, without a loss that matters, then the fastest.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
        models: Rows that have an exported model.

    Returns:
        None where there is none.
    """
    right = [row for row in results['rows'] if row['model'] in models and not row.get('remark')]
    changes = {row['model']: _change(results, row) for row in right}
    least = max((change for change in changes.values() if change is not None), default=0.0)
    # all that is as good as the best, as far as a difference says anything
    good = [row for row in right if changes[row['model']] is None or changes[row['model']] >= min(least, 0) - MUCH]
    return max(good, key=lambda row: row['latency_ratio'] or 0, default=None)


def running_program(path: Path, exported: bool, config: str, image: str | None) -> list[str]:
    """Three lines of Python that detect with a model.

    Args:
        path: The model.
        exported: Whether a runtime executes it, otherwise mmdet does.
        config: The config's path.
        image: The image's path. Defaults to a made-up name.
    """
    name = 'load_exported' if exported else 'load_quantized'
    arguments = f'{str(path)!r}, {config!r}' if exported else repr(str(path))
    return [
        'from mmdet.apis import inference_detector',
        f'from mmdet_ptq import {name}',
        f'print(inference_detector({name}({arguments}), {image or "image.jpg"!r}).pred_instances)',
    ]


def _change(results: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    metric = headline_metric(results)
    before, after = (metric_value(r['metrics'].get(metric)) for r in (results['rows'][0], row))
    return None if before is None or after is None else points(before, after)


def _gain(first: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    sizes = first['size_bytes'], row['size_bytes']
    smaller = f', {sizes[0] / sizes[1]:.1f} times smaller' if sizes[0] > sizes[1] else ', which is not smaller'
    told = f'{format_bytes(sizes[1])} instead of {format_bytes(sizes[0])}{smaller}'
    ratio = row['latency_ratio']
    if ratio is None:
        return f'{told}; no speed, which only exported models have'
    speed = f'{ratio:.2f} times as fast as float' if ratio >= 1 else f'but slower: {ratio:.2f} times the speed of float'
    return f'{told}; {speed} in {row["model"]} (one thread, one image at a time, this processor)'


def _cost(results: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    metric, change = headline_metric(results), _change(results, row)
    if change is None:
        return 'unknown, the evaluation gives no figures'
    before, after = (r['metrics'][metric] for r in (results['rows'][0], row))
    images = results.get('evaluation', {}).get('num_images')
    told = f' on {images} images' if images else ''
    # + 0.0 turns a difference that rounds to nothing into +0.0 instead of -0.0
    interval = _interval(results, row)
    spread = f', 95 % interval {interval[0]:+.1f} to {interval[1]:+.1f}' if interval else ''
    return f'{metric} {before:.3f} -> {after:.3f} ({round(change, 1) + 0.0:+.1f} points{spread}), {row["model"]}{told}'


def _interval(results: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Of the difference, where it was measured for this row."""
    found = results.get('comparison') or {}
    return found.get('interval') if found.get('model') == row['model'] else None
