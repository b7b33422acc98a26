"""Which operators of a model take the time, by the runtime's own profiler."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

WARM_UP = 3


@dataclass
class OperatorTime:
    """All operators of one type in one run of a model.

    Attributes:
        kind: Type of the operator, as the runtime calls it.
        calls: How many there are.
        milliseconds: What they take together.
        bytes: What they read and write.
    """

    kind: str
    calls: int
    milliseconds: float
    bytes: int


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


def print_profile(title: str, times: list[OperatorTime], bandwidth: float) -> None:
    """Prints the table.

    Args:
        title: What is printed above it.
        times: What :func:`profile` returned.
        bandwidth: Bytes per second that memory delivers; tells what the operators would take if that were all.
    """
    total = sum(entry.milliseconds for entry in times) or 1.0
    print(f'\n{title}: {total:.2f} ms in operators; memory delivers {bandwidth / 1e9:.1f} GB/s')
    print(f'  {"operator":<44}{"calls":>6}{"ms":>9}{"share":>8}{"at memory bandwidth, ms":>26}')
    for entry in times:
        share, least = entry.milliseconds / total, 1e3 * entry.bytes / bandwidth
        print(f'  {entry.kind:<44}{entry.calls:>6}{entry.milliseconds:>9.3f}{share:>8.1%}{least:>26.3f}')


def memory_bandwidth(threads: int, megabytes: int = 256, tries: int = 5) -> float:
    """Bytes per second read and written by threads that copy more than caches hold."""
    source, before, best = torch.zeros(megabytes << 20, dtype=torch.uint8), torch.get_num_threads(), math.inf
    target = torch.ones_like(source)
    torch.set_num_threads(threads)
    for _ in range(tries):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(before)
    return 2 * source.numel() / best


def _onnxruntime(path: Path, image: np.ndarray, threads: int, runs: int) -> list[OperatorTime]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / 'profile')
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        for _ in range(WARM_UP + runs):
            session.run(None, {'input': image})
        events = json.loads(Path(session.end_profiling()).read_text(encoding='utf-8'))
    events = [event for event in events if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time')]
    # the warm-up comes first, and each run has as many events
    events = events[len(events) * WARM_UP // (WARM_UP + runs) :]
    calls, micros, size = defaultdict(int), defaultdict(float), defaultdict(int)
    for event in events:
        kind = event['args']['op_name']
        calls[kind] += 1
        micros[kind] += event['dur']
        size[kind] += sum(int(event['args'].get(f'{part}_size', 0)) for part in ('activation', 'parameter', 'output'))
    return [OperatorTime(kind, calls[kind] // runs, micros[kind] / runs / 1e3, size[kind] // runs) for kind in calls]


def _openvino(path: Path, image: np.ndarray, threads: int, runs: int) -> list[OperatorTime]:
    import openvino

    compiled = openvino.Core().compile_model(
        str(path),
        'CPU',
        {
            'INFERENCE_PRECISION_HINT': 'f32',
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_NUM_THREADS': threads,
            'PERF_COUNT': True,
        },
    )
    request = compiled.create_infer_request()
    sizes = {
        op.get_friendly_name(): sum(map(_bytes, (*(i.get_source_output() for i in op.inputs()), *op.outputs())))
        for op in compiled.get_runtime_model().get_ops()
    }
    calls, micros, size = defaultdict(int), defaultdict(float), defaultdict(int)
    for number in range(WARM_UP + runs):
        request.infer([image])
        if number < WARM_UP:
            continue
        for info in request.get_profiling_info():
            if info.status == openvino.ProfilingInfo.Status.EXECUTED:
                kind = f'{info.node_type} {info.exec_type}'
                calls[kind] += 1
                micros[kind] += info.real_time.total_seconds() * 1e6
                size[kind] += sizes[info.node_name]
    return [OperatorTime(kind, calls[kind] // runs, micros[kind] / runs / 1e3, size[kind] // runs) for kind in calls]


def _bytes(value) -> int:
    shape = value.get_partial_shape()
    return math.prod(shape.to_shape()) * value.get_element_type().size if shape.is_static else 0
