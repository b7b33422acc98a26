"""Which operators of a model take the time, by the runtime's own profiler."""
from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmdet_ptq.deploy.runtimes.onnxruntime import open_session

WARM_UP = 3


@dataclass
class OperatorTime:
    """All operators of one type in one run of a model.

    Attributes:
        kind: Type of the operator, as the runtime calls it.
        calls: How many there are.
        milliseconds: What they take together.
        gigabytes_per_second: Bytes they read and write over that time; None where the runtime does not tell.
    """

    kind: str
    calls: int
    milliseconds: float
    gigabytes_per_second: float | None = None


def profile(runtime: str, path: Path, image: np.ndarray, threads: int, runs: int = 20) -> list[OperatorTime]:
    """Times of the operators of a model, the slowest type first.

    Args:
        runtime: 'onnxruntime' or 'openvino'.
        path: The model.
        image: (N, 3, H, W), float32.
        threads: Threads of a run.
        runs: Runs that are averaged. Defaults to 20.
    """
    found = dict(onnxruntime=_onnxruntime, openvino=_openvino)[runtime](path, image, threads, runs)
    return sorted(found, key=lambda entry: -entry.milliseconds)


def print_profile(title: str, times: list[OperatorTime]) -> None:
    """Prints the table."""
    total = sum(entry.milliseconds for entry in times) or 1.0
    print(f'\n{title}: {total:.2f} ms in operators')
    print(f'  {"operator":<44}{"calls":>6}{"ms":>9}{"share":>8}{"GB/s":>8}')
    for entry in times:
        rate = '' if entry.gigabytes_per_second is None else f'{entry.gigabytes_per_second:.1f}'
        share = entry.milliseconds / total
        print(f'  {entry.kind:<44}{entry.calls:>6}{entry.milliseconds:>9.3f}{share:>8.1%}{rate:>8}')


def _onnxruntime(path: Path, image: np.ndarray, threads: int, runs: int) -> list[OperatorTime]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / 'profile')
        session = open_session(str(path), options)
        for _ in range(WARM_UP + runs):
            session.run(None, {'input': image})
        events = json.loads(Path(session.end_profiling()).read_text(encoding='utf-8'))
    events = [event for event in events if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time')]
    # the warm-up comes first, and each run has as many events
    events = events[len(events) * WARM_UP // (WARM_UP + runs):]
    calls, micros, size = defaultdict(int), defaultdict(float), defaultdict(int)
    for event in events:
        kind = event['args']['op_name']
        calls[kind] += 1
        micros[kind] += event['dur']
        size[kind] += sum(int(event['args'].get(f'{part}_size', 0)) for part in ('activation', 'parameter', 'output'))
    return [OperatorTime(kind, calls[kind] // runs, micros[kind] / runs / 1e3, size[kind] / max(micros[kind], 1) / 1e3)
            for kind in calls]


def _openvino(path: Path, image: np.ndarray, threads: int, runs: int) -> list[OperatorTime]:
    import openvino
    compiled = openvino.Core().compile_model(str(path), 'CPU', {
        'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': threads,
        'PERF_COUNT': True})
    request = compiled.create_infer_request()
    calls, micros = defaultdict(int), defaultdict(float)
    for number in range(WARM_UP + runs):
        request.infer([image])
        if number < WARM_UP:
            continue
        for info in request.get_profiling_info():
            if info.status == openvino.ProfilingInfo.Status.EXECUTED:
                kind = f'{info.node_type} {info.exec_type}'
                calls[kind] += 1
                micros[kind] += info.real_time.total_seconds() * 1e6
    return [OperatorTime(kind, calls[kind] // runs, micros[kind] / runs / 1e3) for kind in calls]
