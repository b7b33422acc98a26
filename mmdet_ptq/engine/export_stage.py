"""The export stage: each runtime gets its model, is evaluated like any detector, timed against float."""
from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from mmengine.logging import print_log

from ..analysis import latency_ratio
from ..deploy import IntegerCoverage, get_runtime, model_bytes, open_model, with_runtime

if TYPE_CHECKING:
    from .runner import PTQRunner

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
    """

    metrics: dict
    size_bytes: int
    latency_ratio: float
    integer: list[str]
    float: list[str]
    files: dict[str, int]
    remark: str


def export_runtime(runner: PTQRunner, name: str) -> dict:
    """Exports to one runtime, evaluates the model there and times it.

    Args:
        runner: After ``evaluate``.
        name: The runtime.

    Returns:
        The fields of :class:`Exported`.
    """
    runtime, folder = get_runtime(name), Path(runner.work_dir) / name
    shape = runner.input_shape
    # a copy: the report compares the detector with the float one where both are
    path = runtime.export(copy.deepcopy(runner.detector).cpu(), folder, shape)
    print_log(f'{name}: {path} ({model_bytes(path) / 2**20:.2f} MiB)', 'current')
    model = open_model(path)
    coverage = model.coverage()
    announce_coverage(name, coverage, model.evidence)
    metrics = runner.evaluate_detector(with_runtime(copy.deepcopy(runner.float_detector).cpu(), model, runner.cfg))
    float_path, = (folder / FLOAT_FOLDER).glob(f'model{path.suffix}')
    ratio = time_against_float(path, float_path, shape)
    print_log(f'{name}: {ratio:.2f} times as fast as the float model there, one thread, batch {shape[0]}', 'current')
    return vars(Exported(metrics, model_bytes(path), ratio, coverage.integer, coverage.float, stored_files(folder),
                         model.remark()))


def export_float(runner: PTQRunner, name: str) -> dict:
    """Exports the float detector, against which the integer one is timed later.

    Before the calibration: what has no form in the runtime shows then, and not after hours.

    Args:
        runner: After ``load``.
        name: The runtime.

    Returns:
        Sizes of the files, by name, as ``files``.

    Raises:
        PTQError: The runtime cannot take the detector.
    """
    folder = Path(runner.work_dir) / name / FLOAT_FOLDER
    get_runtime(name).export(copy.deepcopy(runner.float_detector).cpu(), folder, runner.input_shape)
    return dict(files=stored_files(folder))


def stored_files(folder: Path) -> dict[str, int]:
    """Names and sizes of the files of the model in a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob('model.*'))}


def announce_coverage(name: str, coverage: IntegerCoverage, evidence: str) -> None:
    """Says how much of the model the runtime really computes in integers, and names the rest."""
    total = len(coverage.integer) + len(coverage.float)
    print_log(f'{name}: {len(coverage.integer)} of {total} convolutions compute in integers, by {evidence}', 'current')
    for call in coverage.float:
        print_log(f'{name}: {call} stays float', 'current')


def time_against_float(path: Path, float_path: Path, shape: tuple[int, int, int, int]) -> float:
    """Latency ratio float / integer in one runtime, one thread each, interleaved."""
    image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    models = [open_model(p, threads=1) for p in (float_path, path)]
    with torch.no_grad():
        return latency_ratio(*(lambda model=model: model(image) for model in models)).ratio
