"""What the figures of a run do not say by themselves: which not to trust, and what to try next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet_ptq.analysis.figures import headline_metric, metric_value, model_name, points

# a loss of more points than this calls for a next step
MUCH = 0.5
# evaluations of fewer images move by some tenths of a point from one seed to the next
FEW_IMAGES, FEW_CALIBRATION_IMAGES = 500, 128


def closing_lines(results: Mapping[str, Any]) -> list[str]:
    """What one must know of the figures: which are wrong on this processor, how far they are to be trusted, where
    integers do not pay, and what to try where they cost much.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
    """
    lines = [f'{model_name(row)}: {row["remark"]}' for row in results['rows'] if row.get('remark')]
    if any(row['metrics'] for row in results['rows']) and headline_metric(results) is None:
        lines.append(
            'the evaluation gives no figures: its annotations have no objects; check `test_evaluator.ann_file`.'
        )
    timed = {row['model']: row['latency_ratio'] for row in results['rows'] if row['latency_ratio'] is not None}
    slow = {model: ratio for model, ratio in timed.items() if ratio < 1}
    right = {
        row['model']: timed[row['model']]
        for row in results['rows']
        if timed.get(row['model'], 0) >= 1 and not row.get('remark')
    }
    if slow:
        told = ' and '.join(f'{model} ({ratio:.2f}x)' for model, ratio in slow.items())
        best = max(right, key=right.get) if right else None
        lines.append(
            f'on this processor int8 is slower than float in {told}; '
            + (
                f'{best} is faster here ({right[best]:.2f}x).'
                if best
                else 'no exported runtime whose figures are right is faster here.'
            )
        )
    return lines + _trust(results) + _next_steps(results)


def _trust(results: Mapping[str, Any]) -> list[str]:
    images = results.get('evaluation', {}).get('num_images')
    lines = []
    if images is not None and 0 < images < FEW_IMAGES:
        lines.append(
            f'the figures are of {images} images: differences of half a point say little; evaluate on more before you '
            'choose by them.'
        )
    left = [row['name'] for row in results.get('coverage', {}).get('layers', ()) if row['macs'] and not row['integer']]
    if left:
        told = ', '.join(left[:3]) + (f' and {len(left) - 3} more' if len(left) > 3 else '')
        share = 1 - results['coverage']['integer_mac_share']
        lines.append(f'{share:.2%} of the multiply-accumulates stay float: {told}; the coverage table says why.')
    return lines


def _next_steps(results: Mapping[str, Any]) -> list[str]:
    """What to try, in order, where integers cost much; nothing where they do not."""
    metric = headline_metric(results)
    lost = {}
    for row in results['rows'][1:]:
        before, after = (metric_value(r['metrics'].get(metric)) for r in (results['rows'][0], row))
        if before is not None and after is not None and points(before, after) < -MUCH and not row.get('remark'):
            lost[row['model']] = points(before, after)
    if not lost:
        return []
    recipe, models = results['recipe'], [row['model'] for row in results['rows']]
    steps = []
    if recipe.get('dataflow') in ('balanced', 'speed') and 'simulated' in lost:
        steps.append('`--cfg-options ptq.dataflow=accuracy` keeps scales per channel between the layers: slower')
    if recipe['calibration']['num_images'] <= FEW_CALIBRATION_IMAGES:
        more = 4 * recipe['calibration']['num_images']
        steps.append(f'`--cfg-options ptq.calibration.num_images={more}` calibrates on more images')
    if recipe.get('reconstruct') is None and recipe.get('rounding') != 'compensated':
        steps.append(
            '`--cfg-options ptq.rounding=compensated` makes up for the rounding errors of weights, for half as much '
            'calibration more'
        )
    if recipe.get('reconstruct') is None:
        steps.append('`--cfg-options ptq.reconstruct=closed_form` solves the weights of each layer, for some minutes')
    if recipe.get('global_loss') is None:
        steps.append('`--preset w8a8` trains scales and biases with the filtered global loss, for some minutes')
    if recipe.get('protect') is None:
        steps.append('`--cfg-options ptq.protect.max_tensors=10` gives the tensors that cost most a better format')
    steps.append('docs/troubleshooting.md, "AP collapsed", finds the layer')
    told = ', '.join(f'{model} {change:+.1f}' for model, change in lost.items())
    kept = ' (keep `ptq.export`: what runs between the layers is part of it)' if len(models) > 2 else ''
    return [f'integers cost more than {MUCH} points: {told}. To try next, one after another{kept}:'] + [
        f'  {place}. {step}' for place, step in enumerate(steps, 1)
    ]
