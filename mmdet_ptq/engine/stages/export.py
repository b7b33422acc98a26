"""The export stage: each runtime gets its model, is evaluated like any detector, timed against float."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.analysis import LatencyRatio, bops, latency_ratio
from mmdet_ptq.deploy import IntegerCoverage, Runtime, get_runtime, model_bytes, open_model, with_runtime
from mmdet_ptq.engine.detecting import detecting_files, export_detecting
from mmdet_ptq.engine.run import Run
from mmdet_ptq.engine.stage_store import fingerprint

FLOAT_FOLDER = 'float'


@dataclass
class Exported:
    """One runtime's row.

    Attributes:
        metrics: Every figure of the evaluator.
        size_bytes: Bytes of the model's files.
        latency_ratio: Float time / integer time in the same runtime and run, one thread.
        integer: Names of the calls of layers that the runtime computes in integers.
        float: Names of those that it does not.
        files: Sizes of the model's files, by name.
        remark: What makes the figures wrong on this processor; '' if nothing does.
        latency: Median times of both, see :func:`.analysis.result_row`.
    """

    metrics: dict
    size_bytes: int
    latency_ratio: float
    integer: list[str]
    float: list[str]
    files: dict[str, int]
    remark: str
    latency: dict


def export_runtime(run: Run, name: str) -> dict:
    """Exports to one runtime, evaluates the model there and times it.

    Args:
        run: After ``evaluate``.
        name: The runtime.

    Returns:
        The fields of :class:`Exported`.
    """
    runtime, folder = get_runtime(name), Path(run.work_dir) / name
    shape = run.input_shape
    path = _written(run, run.detector, runtime, folder)
    if is_main_process():
        export_detecting(run.detector, runtime, folder, shape, run.cfg, run.export_options)
    barrier()
    print_log(f'{name}: {path} ({model_bytes(path) / 2**20:.2f} MiB)', 'current')
    model = open_model(path)
    coverage = model.whole_coverage()
    announce_coverage(name, coverage, model.evidence)
    metrics = run.evaluate_detector(with_runtime(copy.deepcopy(run.float_detector).cpu(), model, run.cfg), name)
    (float_path,) = (folder / FLOAT_FOLDER).glob(f'model{path.suffix}')
    times = time_against_float(path, float_path, shape)
    print_log(
        f'{name}: {times.ratio:.2f} times as fast as the float model there ({times.second_ms:.2f} ms instead of '
        f'{times.first_ms:.2f} ms), one thread, batch {shape[0]}',
        'current',
    )
    return vars(
        Exported(
            metrics,
            model_bytes(path),
            times.ratio,
            coverage.integer,
            coverage.float,
            stored_files(folder),
            model.remark(),
            dict(ms=times.second_ms, float_ms=times.first_ms, threads=1, batch=shape[0]),
        )
    )


def export_float_to(run: Run, name: str) -> dict:
    """Exports the float detector, against which the integer one is timed later.

    Before the calibration: what has no form in the runtime shows then, and not after hours.

    Args:
        run: After ``load``.
        name: The runtime.

    Returns:
        Sizes of the files, by name, as ``files``.

    Raises:
        PTQError: The runtime cannot take the detector.
    """
    folder = Path(run.work_dir) / name / FLOAT_FOLDER
    _written(run, run.float_detector, get_runtime(name), folder)
    return dict(files=stored_files(folder))


def _written(run: Run, detector: nn.Module, runtime: type[Runtime], folder: Path) -> Path:
    """Exports a detector, once for all ranks; returns the model's path."""
    paths = [None]
    if is_main_process():
        # a copy: the report compares the detector with the float one where both are
        paths = [runtime.export(copy.deepcopy(detector).cpu(), folder, run.input_shape, **run.export_options)]
    broadcast_object_list(paths)
    return paths[0]


def stored_files(folder: Path) -> dict[str, int]:
    """Names and sizes of the files of the model in a folder, and of what detects with it."""
    files = [*sorted(folder.glob('model*.*')), *detecting_files(folder)]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def announce_coverage(name: str, coverage: IntegerCoverage, evidence: str) -> None:
    """Says how much of the model the runtime really computes in integers, and names the rest."""
    total = len(coverage.integer) + len(coverage.float)
    print_log(f'{name}: {len(coverage.integer)} of {total} convolutions compute in integers, by {evidence}', 'current')
    for call in coverage.float:
        print_log(f'{name}: {call} stays float', 'current')


def time_against_float(path: Path, float_path: Path, shape: tuple[int, int, int, int]) -> LatencyRatio:
    """Latency of float against integer in one runtime, one thread each, interleaved."""
    image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    models = [open_model(p, threads=1) for p in (float_path, path)]
    with torch.no_grad():
        return latency_ratio(*(lambda model=model: model.run_all(image) for model in models))


def export(run: Run) -> None:
    """Exports to every runtime of ``ptq.export``, evaluates the models there and times them."""
    for name in run.ptq.export:
        inputs = fingerprint(run.quantized_inputs(), name, run.input_shape, *run.export_options.values())
        row = _exported(run, f'export_{name}', inputs, Path(name), lambda name=name: export_runtime(run, name))
        run.results.setdefault('runtimes', {})[name] = dict(integer=row['integer'], float=row['float'])
        run.add_row(
            name,
            row['metrics'],
            row['size_bytes'],
            bops(run.structure),
            row['latency_ratio'],
            row.get('remark', ''),
            row.get('latency'),
        )


def export_float(run: Run) -> None:
    """Exports the float detector to every runtime of ``ptq.export``, before anything that takes long."""
    for name in run.runtimes:
        _exported(
            run,
            f'export_{name}_float',
            fingerprint(run.inputs['prepare'], name, run.input_shape, *run.export_options.values()),
            Path(name) / FLOAT_FOLDER,
            lambda name=name: export_float_to(run, name),
        )


def _exported(run: Run, stage: str, inputs: str, folder: Path, work: Callable[[], dict]) -> dict:
    """Runs a stage that writes a model; it is taken over only while its files are there."""
    state, taken_over = run.stages.run(stage, inputs, work)
    if taken_over and state.get('files') != stored_files(Path(run.work_dir) / folder):
        print_log(f'stage {stage}: the model in {folder} is gone or another one; it runs again', 'current')
        run.stages.path(stage).unlink(missing_ok=True)
        state, _ = run.stages.run(stage, inputs, work)
    return state
