"""Figures of results: which one stands for a run, and how two of them differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

# behind the name of a model whose figures this processor makes wrong
MARK = ' (!)'


def metric_value(value: Any) -> float | None:
    """A metric as a number; None where there is none (COCO writes -1 for "no such objects")."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value == -1:
        return None
    return float(value)


def points(reference: float, value: float) -> float:
    """Difference in points: hundredths for figures between 0 and 1, the figure's own unit for larger ones."""
    scale = 100 if max(abs(reference), abs(value)) <= 1 else 1
    return scale * (value - reference)


def headline_metric(results: Mapping[str, Any]) -> str | None:
    """The metric that stands for a run: the first named mAP, AP or PQ, else the first number, or None.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
    """
    if not results['rows']:
        return None
    named = [name for name, value in results['rows'][0]['metrics'].items() if metric_value(value) is not None]
    for ending in ('mAP', 'AP', 'PQ'):
        for name in named:
            if name.endswith(ending):
                return name
    return named[0] if named else None


def model_name(row: Mapping[str, Any]) -> str:
    """A row's name, marked where this processor makes its figures wrong.

    Args:
        row: See :func:`mmdet_ptq.analysis.results.result_row`; older ones have no remark.
    """
    return row['model'] + (MARK if row.get('remark') else '')
