"""``results.json``: everything a run measured, in one file of a fixed schema."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet_ptq.doctor import processor
from mmdet_ptq.errors import PTQError
from mmdet_ptq.fields import plain
from mmdet_ptq.files import write_json
from mmdet_ptq.registry import runtime_names
from mmdet_ptq.version import __version__
from mmdet_ptq.wrapping import Structure, coverage_rows, integer_mac_share

SCHEMA = 1
KEYS = ('schema', 'config', 'recipe', 'seed', 'versions', 'date', 'calibration', 'coverage', 'stages', 'rows')


def versions() -> dict[str, str]:
    """Versions of everything that a run's figures depend on, the processor among them.

    Returns:
        ``'missing'`` for what is not installed.
    """
    found = {'mmdet_ptq': __version__, 'python': platform.python_version()}
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'numpy', 'onnx', *runtime_names()):
        try:
            found[name] = str(import_module(name).__version__)
        except ImportError:
            found[name] = 'missing'
    found['processor'] = _processor()
    return found


def _processor() -> str:
    """The processor, the vector instructions that torch uses, with which sums come out differently, and int8's."""
    name, integers = processor()
    if integers == [] and platform.machine() in ('x86_64', 'AMD64'):
        integers = ['no VNNI']
    return ', '.join([name, torch.backends.cpu.get_cpu_capability(), *(integers or [])])


def new_results(
    config: str,
    recipe: Mapping[str, Any],
    seed: int,
    structure: Structure,
    image_ids: Sequence[int | str],
    skipped: Sequence[str] = (),
) -> dict[str, Any]:
    """Starts the results of a run; stages and rows are added as they come.

    Args:
        config: The config's path as the user gave it.
        recipe: The validated ``ptq`` block (:meth:`mmdet_ptq.config.PTQConfig.to_dict`).
        seed: Seed of the run; that of the calibration draw stands in the recipe.
        structure: The structure of the quantized detector.
        image_ids: Ids of the calibration images that were used.
        skipped: Paths of the calibration images that could not be read. Defaults to none.
    """
    return {
        'schema': SCHEMA,
        'config': str(config),
        'recipe': dict(recipe),
        'seed': seed,
        'versions': versions(),
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'calibration': {'num_images': len(image_ids), 'image_ids': list(image_ids), 'skipped': list(skipped)},
        'coverage': {
            'layers': [asdict(row) for row in coverage_rows(structure)],
            'integer_mac_share': integer_mac_share(structure),
        },
        'stages': {},
        'rows': [],
    }


def result_row(
    model: str,
    metrics: Mapping[str, Any],
    size_bytes: int | None,
    bops: int | None,
    latency_ratio: float | None = None,
    remark: str = '',
    latency: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One row of the results: a model and what was measured on it.

    Args:
        model: ``'float'``, ``'simulated'`` or the name of a runtime.
        metrics: Every figure of the evaluator; empty where there are no annotations.
        size_bytes: Bytes of the model's numbers.
        bops: Bit operations of one image.
        latency_ratio: Float time / integer time in the same runtime and run. Defaults to None: not measured.
        remark: What makes the row's figures wrong on this processor, in one sentence. Defaults to '': nothing does.
        latency: ``dict(ms, float_ms, threads, batch)``: median times of one run of this model and of the float one in
            the same runtime. Defaults to None: not measured.
    """
    return {
        'model': model,
        'metrics': dict(metrics),
        'size_bytes': size_bytes,
        'bops': bops,
        'latency_ratio': latency_ratio,
        'remark': remark,
        'latency': None if latency is None else dict(latency),
    }


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Writes the results so that the file is whole at every moment: to a temporary file, then renamed.

    Args:
        path: The file, ``results.json``.
        results: See :func:`new_results`.

    Raises:
        PTQError: The file cannot be written.
    """
    order = {key: place for place, key in enumerate(KEYS)}
    ordered = {key: results[key] for key in sorted(results, key=lambda key: order.get(key, len(KEYS)))}
    write_json(path, plain(ordered, _stored))


def read_results(path: str | Path) -> dict[str, Any]:
    """Reads a ``results.json``.

    Args:
        path: The file.

    Raises:
        PTQError: The file is missing, damaged, or of another schema.
    """
    try:
        results = json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise PTQError(f'{path} cannot be read ({error.strerror}); run tools/ptq.py first.') from error
    except ValueError as error:
        raise PTQError(f'{path} is no valid JSON file ({error}); delete it and run tools/ptq.py again.') from error
    missing = [key for key in KEYS if not isinstance(results, dict) or key not in results]
    if missing:
        raise PTQError(f'{path} is no results file of mmdet-ptq: it lacks {", ".join(missing)}.')
    if results['schema'] != SCHEMA:
        raise PTQError(f'{path} has schema {results["schema"]!r}, this version reads {SCHEMA}; run tools/ptq.py again.')
    return results


def _stored(value: Any) -> Any:
    """What json can hold: numpy and torch numbers become numbers, NaN and infinity become null."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return plain(value.tolist(), _stored)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, type(None))):
        return value
    return plain(list(value), _stored) if isinstance(value, Iterable) else str(value)
