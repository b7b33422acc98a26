"""Float against int8 in the same runtime, interleaved; ONNX Runtime's quantize_static and NNCF in the same run.

python benchmarks/latency.py configs/retinanet/retinanet_r18_w8a8_coco.py@320x320 work_dirs/yolox_nano \
    --random-weights --threads 1 2 --pairs 40 --out docs/results/latency.csv

A subject is the work directory of a tools/ptq.py run that exported, or a config, at the size of its test pipeline or of
``@HEIGHTxWIDTH``. Time is all that is measured, so that ranges come from a few generated images and nothing is trained;
``--random-weights`` needs no checkpoint either.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import torch
from float_detectors import build_detector, generated_batches, pipeline_size, settle_norms
from mmengine.registry import init_default_scope
from peer_models import package_version, quantize_nncf, quantize_onnxruntime
from profiles import memory_bandwidth, print_profile, profile
from runs import ROOT, one_sentence, write_csv

from mmdet_ptq import quantize
from mmdet_ptq.analysis import latency_ratio, versions
from mmdet_ptq.cli import load_config
from mmdet_ptq.deploy import get_runtime, model_bytes, open_model
from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.errors import PTQError

RUNTIMES = ('onnxruntime', 'openvino')
FLOAT, OURS = 'float', 'ours'
# what other tools make, by the runtime it runs in
PEERS = dict(onnxruntime='quantize_static', openvino='nncf')
VERSIONS = ('mmdet_ptq', 'torch', 'mmdet', 'numpy', 'python')
FIELDS = (
    'detector',
    'size',
    'runtime',
    'model',
    'threads',
    'float_ms',
    'int8_ms',
    'ratio',
    'peer_ratio',
    'static_ratio',
    'pairs',
    'file_bytes',
    'float_bytes',
    'integer_convolutions',
    'convolutions',
    'weights',
    'note',
    'cpu',
    'instructions',
    'load',
    'date',
    *VERSIONS,
    'onnxruntime',
    'openvino',
    'nncf',
    'command',
)
PAUSE = 0.05  # seconds, after which no thread of another model waits in a loop for work any more
INSTRUCTIONS = ('avx2', 'avx_vnni', 'avx512_vnni', 'amx_int8')
ISA = 'ONEDNN_MAX_CPU_ISA'  # keeps OpenVINO from the newest of them
# nothing of a recipe but its formats shows in the time
UNTRAINED = dict(protect=None, reconstruct=None, global_loss=None, export=[])


@dataclass
class Subject:
    """A detector in every runtime.

    Attributes:
        name: What its lines are called.
        source: How the command line names it, from the project's root; outside of it without its folder.
        weights: Where its weights come from, 'trained' or 'random'.
        models: Runtime to kind of model (float, ours, a peer's) to file.
        notes: (Runtime, kind) to why there is none.
        built: Whether the command line's changes to configs made it.
    """

    name: str
    source: str
    weights: str
    models: dict[str, dict[str, Path]]
    notes: dict[tuple[str, str], str]
    built: bool


# ------------------------------------------------------------------ models


def exported_subject(folder: Path, runtimes: Sequence[str] = RUNTIMES) -> Subject:
    """The models that a run of tools/ptq.py left.

    Raises:
        PTQError: It exported to none of the runtimes.
    """
    models = {}
    for runtime in runtimes:
        suffix = get_runtime(runtime).suffix
        found = {FLOAT: folder / runtime / 'float' / f'model{suffix}', OURS: folder / runtime / f'model{suffix}'}
        if all(path.is_file() for path in found.values()):
            models[runtime] = found
    if not models:
        raise PTQError(
            f'{folder} holds no exported models; run tools/ptq.py with '
            f"--cfg-options 'ptq.export=[{','.join(runtimes)}]'."
        )
    name = '/'.join(folder.resolve().parts[-2:])  # work_dirs/DETECTOR/PRESET
    return Subject(name, within_project(folder) or name, 'trained', models, {}, built=False)


def within_project(path: Path) -> str | None:
    """A path as it is named from the project's root; None outside of it."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None


def built_subject(config: Path, size: tuple[int, int] | None, folder: Path, args: argparse.Namespace) -> Subject:
    """Builds a config's detector, quantizes it with generated images and exports both to every runtime.

    Args:
        config: The config.
        size: Height and width of the images; None takes those of the test pipeline.
        folder: Gets the models.
        args: The command line.
    """
    cfg = load_config(str(config), args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    torch.manual_seed(args.seed)
    detector = build_detector(cfg)
    batches = generated_batches(size or pipeline_size(cfg), args.images, args.seed)
    if args.random_weights:
        settle_norms(detector, batches)
    else:
        load_float_checkpoint(detector, cfg.load_from)
    detector.eval()
    shape = tuple(detector.data_preprocessor(copy.deepcopy(batches[0]), False)['inputs'].shape)
    block = {key: value for key, value in (cfg.get('ptq') or {}).items() if key not in ('preset', 'calibration')}
    preset = args.preset or (cfg.get('ptq') or {}).get('preset') or 'w8a8'
    quantized = quantize(detector, copy.deepcopy(batches), preset, ptq={**block, **UNTRAINED})
    models = {}
    for name in args.runtimes:
        runtime = get_runtime(name)
        runtime.check()
        models[name] = {
            FLOAT: runtime.export(detector, folder / name / 'float', shape),
            OURS: runtime.export(quantized, folder / name, shape),
        }
    source = f'{within_project(config) or config.name}@{shape[2]}x{shape[3]}'
    return Subject(config.stem, source, 'random' if args.random_weights else 'trained', models, {}, built=True)


def add_peers(subject: Subject, folder: Path, args: argparse.Namespace) -> None:
    """Adds the models of other tools, made from the same float graphs and as many generated images."""
    makers = dict(quantize_static=quantize_onnxruntime, nncf=quantize_nncf)
    for runtime, models in subject.models.items():
        peer = PEERS[runtime]
        if peer not in args.peers:
            continue
        shape = open_model(models[FLOAT]).meta['input_shape']
        rng = np.random.default_rng(args.seed)
        images = [rng.standard_normal(shape, dtype=np.float32) for _ in range(args.images)]
        path = folder / peer / f'model{models[FLOAT].suffix}'
        try:
            makers[peer](models[FLOAT], path, images)
        except PTQError as error:
            subject.notes[runtime, peer] = f'skipped: {error}'
            continue
        models[peer] = path


# ------------------------------------------------------------------ times


def measure(subject: Subject, threads: int, args: argparse.Namespace) -> list[dict]:
    """One line per int8 model."""
    lines, static, pause = [], static_run(subject, threads), PAUSE if threads > 1 else 0.0
    for runtime, models in subject.models.items():
        peer = PEERS[runtime]
        opened = {kind: open_model(path, threads) for kind, path in models.items()}
        if opened[FLOAT].parts:
            raise PTQError('peers quantize one graph, and a detector with two stages is several.')
        image = example(opened[FLOAT])
        runs = {kind: partial(model, image) for kind, model in opened.items()}
        for kind in (OURS, peer):
            if kind not in runs:
                if (runtime, kind) in subject.notes:
                    lines.append(dict(runtime=runtime, model=kind, note=subject.notes[runtime, kind]))
                continue
            timed = latency_ratio(runs[FLOAT], runs[kind], args.pairs, pause)
            # pair by pair as well: two ratios to float of different minutes say little about each other
            beside = latency_ratio(runs[peer], runs[OURS], args.pairs, pause) if kind == OURS and peer in runs else None
            # "is it slower than what I have" is asked across runtimes
            across = latency_ratio(static, runs[OURS], args.pairs, PAUSE) if kind == OURS and static else None
            coverage = opened[kind].coverage()
            lines.append(
                dict(
                    runtime=runtime,
                    model=kind,
                    float_ms=round(timed.first_ms, 3),
                    int8_ms=round(timed.second_ms, 3),
                    ratio=round(timed.ratio, 2),
                    peer_ratio=round(beside.ratio, 2) if beside else None,
                    static_ratio=round(across.ratio, 2) if across else None,
                    pairs=args.pairs,
                    file_bytes=model_bytes(models[kind]),
                    float_bytes=model_bytes(models[FLOAT]),
                    integer_convolutions=len(coverage.integer),
                    convolutions=len(coverage.integer) + len(coverage.float),
                )
            )
    shape = open_model(next(iter(subject.models.values()))[FLOAT]).meta['input_shape']
    return [complete(subject, f'{shape[2]}x{shape[3]}', threads, line, args) for line in lines]


def static_run(subject: Subject, threads: int) -> Callable[[], object] | None:
    """Runs what quantize_static made, in ONNX Runtime; ours in every runtime stands beside it."""
    path = subject.models.get('onnxruntime', {}).get('quantize_static')
    if path is None:
        return None
    model = open_model(path, threads)
    return partial(model, example(open_model(subject.models['onnxruntime'][FLOAT])))


def example(model) -> np.ndarray:
    """A random image of the shape that a model was exported for."""
    return np.random.default_rng(0).standard_normal(model.meta['input_shape'], dtype=np.float32)


def complete(subject: Subject, size: str, threads: int, line: dict, args: argparse.Namespace) -> dict:
    """Adds what every line says."""
    known = versions()
    isa = os.environ.get(ISA)
    command = [
        *([f'{ISA}={isa}'] if isa else []),
        'python',
        'benchmarks/latency.py',
        subject.source,
        *(['--random-weights'] if subject.weights == 'random' else []),
        '--threads',
        str(threads),
        '--pairs',
        str(args.pairs),
        '--runtimes',
        *args.runtimes,
        '--peers',
        *args.peers,
        '--out',
        args.out.name,
        *(['--preset', args.preset] if args.preset and subject.built else []),
        *(['--cfg-options', *args.cfg_options] if args.cfg_options and subject.built else []),
    ]
    return dict(
        detector=subject.name,
        size=size,
        threads=threads,
        **line,
        weights=subject.weights,
        **processor(),
        load=round(os.getloadavg()[0], 1),
        date=datetime.now(timezone.utc).date().isoformat(),
        **{name: known[name] for name in VERSIONS},
        **{name: package_version(name) for name in ('onnxruntime', 'openvino', 'nncf')},
        command=' '.join(command),
    )


def processor() -> dict:
    """Name of the processor and its instructions for 8-bit integers; empty where Linux does not tell."""
    path = Path('/proc/cpuinfo')
    text = path.read_text(encoding='utf-8') if path.is_file() else ''
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in text.splitlines())}
    flags = fields.get('flags', '').split()
    return dict(cpu=fields.get('model name', ''), instructions=' '.join(i for i in INSTRUCTIONS if i in flags))


def print_lines(lines: list[dict]) -> None:
    """Prints the ratios."""
    for line in lines:
        head = f'{line["detector"]} {line["size"]}, {line["runtime"]}, {line["model"]}, {line["threads"]} threads'
        if 'ratio' not in line:
            print(f'{head}: {line["note"]}')
            continue
        beside = ''.join(
            f', {line[key]} times {peer}'
            for key, peer in (
                ('peer_ratio', PEERS[line['runtime']]),
                ('static_ratio', "ONNX Runtime's quantize_static"),
            )
            if line[key] is not None
        )
        print(
            f'{head}: {line["float_ms"]:.1f} ms float, {line["int8_ms"]:.1f} ms int8, {line["ratio"]} times float'
            f'{beside}, {line["integer_convolutions"]} of {line["convolutions"]} convolutions in integers'
        )


def print_profiles(subject: Subject, threads: int) -> None:
    """Prints which operators take the time, of each model."""
    bandwidth = memory_bandwidth(threads)
    for runtime, models in subject.models.items():
        for kind, path in models.items():
            image = example(open_model(path))
            print_profile(
                f'{subject.name}, {runtime}, {kind}, {threads} threads',
                profile(runtime, path, image, threads),
                bandwidth,
            )


def parse_subject(text: str) -> tuple[Path, tuple[int, int] | None]:
    """Splits ``PATH@HEIGHTxWIDTH``.

    Raises:
        PTQError: The size is none, or there is no such path.
    """
    path, _, size = text.partition('@')
    if not Path(path).exists():
        raise PTQError(f'there is neither a config nor a work directory {path!r}; check the path.')
    if not size:
        return Path(path), None
    parts = size.split('x')
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise PTQError(f'{text!r} must end in @HEIGHTxWIDTH, as in @320x320.')
    return Path(path), (int(parts[0]), int(parts[1]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('subjects', nargs='+', help='work directories of exported runs, or configs (@HEIGHTxWIDTH)')
    parser.add_argument('--random-weights', action='store_true', help='configs: take no checkpoint')
    parser.add_argument('--preset', help="configs: replaces the config's preset; nothing is trained, formats only")
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--pairs', type=int, default=40)
    parser.add_argument('--images', type=int, default=4, help='generated images that ranges come from')
    parser.add_argument('--runtimes', nargs='+', default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument('--peers', nargs='*', default=list(PEERS.values()), choices=list(PEERS.values()))
    parser.add_argument('--profile', action='store_true', help='print which operator types take the time')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'latency')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='changes to every config')
    args = parser.parse_args(argv)
    lines: list[dict] = []
    for path, size in [parse_subject(text) for text in args.subjects]:
        folder = args.work_dir / path.resolve().with_suffix('').name
        subject = exported_subject(path, args.runtimes) if path.is_dir() else built_subject(path, size, folder, args)
        add_peers(subject, folder, args)
        for threads in args.threads:
            found = measure(subject, threads, args)
            print_lines(found)
            lines += found
            write_csv(args.out, lines, FIELDS)
        if args.profile:
            print_profiles(subject, args.threads[0])


if __name__ == '__main__':
    one_sentence(main)
