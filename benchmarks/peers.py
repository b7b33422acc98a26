"""Ours beside other tools at 8 bits: same calibration images, same evaluation images, mmdet's evaluator, in one go.

python benchmarks/peers.py CONFIG [CONFIG ...] --out docs/results/peers.csv

Besides the extras onnxruntime and openvino it needs NNCF: ``pip install nncf`` (it changes none of our packages). A
peer whose package is missing gets a line that says so. A second run with the same --work-dir takes over what is
finished.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from float_detectors import build_detector
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from peer_models import need, network, package_version, quantize_nncf, quantize_onnxruntime, quantize_torch, torch_bytes
from runs import METRIC, ROOT, VERSIONS, calibration_seconds, one_sentence, run_ptq, write_csv
from torch import nn

from mmdet_ptq.analysis import float_size_bytes, latency_ratio, versions
from mmdet_ptq.calibration import CalibrationDataset, source_datasets
from mmdet_ptq.calibration.images import build_dataset
from mmdet_ptq.cli import load_config
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import check_exportable, get_runtime, model_bytes, open_model, with_runtime
from mmdet_ptq.engine import evaluate
from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.engine.stage_store import fingerprint
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import file_hash, write_json
from mmdet_ptq.predictions.two_stage import is_two_stage

RUNTIMES = ('onnxruntime', 'openvino')
FIELDS = (
    'detector',
    'peer',
    'runtime',
    'AP',
    'drop_points',
    'calibration_seconds',
    'file_bytes',
    'float_file_bytes',
    'integer_convolutions',
    'convolutions',
    'latency_ratio',
    'note',
    'calibration_images',
    'seed',
    'date',
    *VERSIONS,
    'onnxruntime',
    'openvino',
    'nncf',
    'command',
)


class Subject:
    """One float detector, and what all peers share of it.

    Args:
        config: The config file.
        args: The command line.
    """

    def __init__(self, config: Path, args: argparse.Namespace) -> None:
        self.config, self.args, self.name = config.resolve(), args, config.stem
        self.folder = args.work_dir.resolve() / self.name
        self.cfg: Config = load_config(str(self.config), args.cfg_options)
        self.cfg.work_dir = str(self.folder / 'evaluation')
        init_default_scope(self.cfg.get('default_scope') or 'mmdet')
        block = dict(self.cfg.get('ptq') or {})
        block['calibration'] = {**block.get('calibration', {}), 'num_images': args.images, 'seed': args.seed}
        self.calibration = PTQConfig.from_dict(block, preset=args.preset).calibration
        self.key = fingerprint(
            self.cfg.get('model'),
            self.cfg.get('test_dataloader'),
            self.cfg.get('test_evaluator'),
            vars(self.calibration),
            file_hash(self.cfg.load_from),
        )
        self.float_ap: float | None = None
        self._float_models: dict[str, Path] = {}

    @cached_property
    def detector(self) -> nn.Module:
        """The trained float detector."""
        detector = build_detector(self.cfg)
        load_float_checkpoint(detector, self.cfg.load_from)
        check_exportable(detector)
        if is_two_stage(detector):
            raise PTQError('peers quantize one graph, and a detector with two stages is several.')
        return detector.eval()

    @cached_property
    def samples(self) -> list[dict]:
        """The calibration images that ours draws, with what the pipeline packs beside them."""
        from mmdet.registry import DATASETS

        evaluation = build_dataset(DATASETS, copy.deepcopy(self.cfg.test_dataloader.dataset), 'test_dataloader.dataset')
        return list(
            CalibrationDataset(
                source_datasets(self.cfg, self.calibration),
                self.calibration.num_images,
                self.calibration.seed,
                evaluation,
            )
        )

    @cached_property
    def images(self) -> list[np.ndarray]:
        """The same, each as the network reads it."""
        return [
            self.detector.data_preprocessor(pseudo_collate([sample]), False)['inputs'].numpy()
            for sample in self.samples
        ]

    def float_model(self, runtime: str) -> Path:
        """The float detector in a runtime; exported when it is first asked for."""
        need(runtime)
        if runtime not in self._float_models:
            self._float_models[runtime] = get_runtime(runtime).export(
                copy.deepcopy(self.detector), self.folder / 'float' / runtime, self.images[0].shape
            )
        return self._float_models[runtime]

    def evaluate(self, detector: nn.Module) -> float:
        """AP on the config's evaluation images."""
        detector.dataset_meta = {}
        return evaluate(self.cfg, detector)[METRIC]

    def measured(self, runtime: str, path: Path, seconds: float) -> dict:
        """The line of a runtime's model: evaluated, and timed against the float model there."""
        model = open_model(path)
        coverage = model.coverage()
        integer = len(coverage.integer)
        ap = self.evaluate(with_runtime(copy.deepcopy(self.detector), model, self.cfg))
        float_path = self.float_model(runtime)
        first, second = (open_model(p, threads=1) for p in (float_path, path))
        image = self.images[0]
        ratio = latency_ratio(partial(first, image), partial(second, image), self.args.pairs).ratio
        return dict(
            runtime=runtime,
            AP=ap,
            calibration_seconds=round(seconds),
            file_bytes=model_bytes(path),
            float_file_bytes=model_bytes(float_path),
            integer_convolutions=integer,
            convolutions=integer + len(coverage.float),
            latency_ratio=round(ratio, 2),
        )


def measure_float(subject: Subject) -> list[dict]:
    """The float detector in torch."""
    return [
        dict(
            runtime='torch',
            AP=subject.evaluate(copy.deepcopy(subject.detector)),
            file_bytes=float_size_bytes(subject.detector),
            note='bytes of its numbers',
        )
    ]


def onnxruntime_peer(method: str, narrow: bool = False) -> Callable[[Subject], list[dict]]:
    """ONNX Runtime's own quantization."""
    name = f'onnxruntime_{method}' + ('_narrow' if narrow else '')

    def measure(subject: Subject) -> list[dict]:
        source, out = subject.float_model('onnxruntime'), subject.folder / name / 'model.onnx'
        images = subject.images
        start = time.perf_counter()
        quantize_onnxruntime(source, out, images, method, narrow)
        return [subject.measured('onnxruntime', out, time.perf_counter() - start)]

    return measure


def nncf_peer(preset: str, narrow: bool = False) -> Callable[[Subject], list[dict]]:
    """NNCF's quantization for OpenVINO."""
    name = f'nncf_{preset}' + ('_narrow' if narrow else '')

    def measure(subject: Subject) -> list[dict]:
        need('nncf')
        source, out = subject.float_model('openvino'), subject.folder / name / 'model.xml'
        images = subject.images
        start = time.perf_counter()
        quantize_nncf(source, out, images, preset, narrow)
        return [subject.measured('openvino', out, time.perf_counter() - start)]

    return measure


def measure_torch(subject: Subject) -> list[dict]:
    """torch.ao's eager static quantization."""
    images = subject.images
    start = time.perf_counter()
    detector, integer, layers = quantize_torch(subject.detector, images)
    seconds = time.perf_counter() - start
    size = torch_bytes(detector, subject.folder / 'torch_ao' / 'int8.pth')
    float_size = torch_bytes(subject.detector, subject.folder / 'torch_ao' / 'float.pth')
    ap = subject.evaluate(detector)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratio = latency_ratio(network(subject.detector, images[0]), network(detector, images[0]), subject.args.pairs).ratio
    torch.set_num_threads(threads)
    return [
        dict(
            runtime='torch',
            AP=ap,
            calibration_seconds=round(seconds),
            file_bytes=size,
            float_file_bytes=float_size,
            integer_convolutions=integer,
            convolutions=layers,
            latency_ratio=round(ratio, 2),
            note='each convolution in its own QuantWrapper: eager mode knows no quantized additions between them',
        )
    ]


def ours(told: str = '', options: Sequence[str] = (), arguments: Sequence[str] = ()) -> Callable[[Subject], list[dict]]:
    """Ours, with further options and arguments of tools/ptq.py."""
    return partial(measure_ours, told=told, options=options, arguments=arguments)


def measure_ours(subject: Subject, told: str, options: Sequence[str], arguments: Sequence[str]) -> list[dict]:
    """One run of tools/ptq.py: what it simulates, and what it exports."""
    args = subject.args
    folder = subject.folder / '_'.join(['ours', args.preset, *([told] if told else [])])
    _, results = run_ptq(
        subject.config,
        args.preset,
        folder,
        [
            f'ptq.calibration.num_images={args.images}',
            f'ptq.export=[{",".join(RUNTIMES)}]',
            *options,
            *args.cfg_options,
        ],
        ['--seed', str(args.seed), *arguments],
    )
    lines = []
    for row in results['rows']:
        if row['model'] == 'float':
            continue
        coverage = results.get('runtimes', {}).get(row['model'])
        counted = coverage is not None
        float_path = folder / row['model'] / 'float'
        lines.append(
            dict(
                runtime=row['model'],
                AP=row['metrics'][METRIC],
                calibration_seconds=calibration_seconds(results),
                file_bytes=row['size_bytes'],
                float_file_bytes=sum(file.stat().st_size for file in float_path.glob('model.*')) if counted else None,
                integer_convolutions=len(coverage['integer']) if counted else None,
                convolutions=len(coverage['integer']) + len(coverage['float']) if counted else None,
                latency_ratio=round(row['latency_ratio'], 2) if row['latency_ratio'] else None,
                note=f'preset {args.preset}' + (f', {told}' if told else ''),
            )
        )
    return lines


PEERS: dict[str, Callable[[Subject], list[dict]]] = {
    'float': measure_float,
    'ort_minmax': onnxruntime_peer('MinMax'),
    'ort_percentile': onnxruntime_peer('Percentile'),
    'ort_minmax_narrow': onnxruntime_peer('MinMax', narrow=True),
    # Before NNCF: behind it, in the same process, torch's quantized layers end in a segmentation fault. The process may
    # still end in one, after the last line was written.
    'torch_ao': measure_torch,
    'nncf_performance': nncf_peer('PERFORMANCE'),
    'nncf_mixed': nncf_peer('MIXED'),
    'nncf_mixed_narrow': nncf_peer('MIXED', narrow=True),
    'ours': ours(),
    'ours_fast': ours('fast', arguments=('--fast',)),
    'ours_protected': ours('protected', ('ptq.protect.images=8',)),
}


def peer_lines(subject: Subject, peer: str) -> list[dict]:
    """A peer's lines: taken over, or measured now; a failure is a line, too, and is tried again next time."""
    store = (
        subject.folder / 'lines' / (f'{peer}_{subject.args.preset}.json' if peer.startswith('ours') else f'{peer}.json')
    )
    if store.is_file():
        kept = json.loads(store.read_text(encoding='utf-8'))
        if kept['inputs'] == inputs_of(subject, peer):
            # float may have failed when they were measured
            return [{**line, 'drop_points': drop_points(subject, peer, line)} for line in kept['lines']]
    try:
        lines = [complete(subject, peer, line) for line in PEERS[peer](subject)]
    except PTQError as error:
        return [complete(subject, peer, dict(note=f'skipped: {error}'))]
    except Exception as error:  # a peer may fail in any way of its own; the others go on
        traceback.print_exc()
        told = ' '.join(str(error).split())[:200]
        return [complete(subject, peer, dict(note=f'failed: {type(error).__name__}: {told}'))]
    write_json(store, dict(inputs=inputs_of(subject, peer), lines=lines))
    return lines


def inputs_of(subject: Subject, peer: str) -> str:
    """Hash of what a peer's lines depend on."""
    is_ours = peer.startswith('ours')
    block = dict(subject.cfg.get('ptq') or {}) if is_ours else None
    packages = [package_version(name) for name in ('onnxruntime', 'openvino', 'nncf', 'torch')]
    return fingerprint(subject.key, peer, block, subject.args.preset if is_ours else None, packages)


def complete(subject: Subject, peer: str, line: dict) -> dict:
    """Adds what every line says."""
    args, known = subject.args, versions()
    command = [
        'python',
        'benchmarks/peers.py',
        subject.config.name,
        '--images',
        str(args.images),
        '--seed',
        str(args.seed),
        '--preset',
        args.preset,
        '--peers',
        peer,
    ]
    if args.cfg_options:
        command += ['--cfg-options', *args.cfg_options]
    return dict(
        detector=subject.name,
        peer=peer,
        **line,
        drop_points=drop_points(subject, peer, line),
        calibration_images=args.images,
        seed=args.seed,
        date=datetime.now(timezone.utc).date().isoformat(),
        **{name: known[name] for name in VERSIONS},
        **{name: package_version(name) for name in ('onnxruntime', 'openvino', 'nncf')},
        command=' '.join(command),
    )


def drop_points(subject: Subject, peer: str, line: dict) -> float | None:
    """Points of AP that a line is below float; None where one of the two has none."""
    reference = line.get('AP') if peer == 'float' else subject.float_ap
    return None if reference is None or line.get('AP') is None else round(100 * (reference - line['AP']), 1)


def wanted(args: argparse.Namespace) -> list[str]:
    """The peers in the order they run; every line is compared with float, so float comes first."""
    return [peer for peer in PEERS if peer in ('float', *args.peers)]


def lines_of(config: Path, args: argparse.Namespace) -> list[dict]:
    """All lines of a detector, written peer by peer."""
    lines, subject = [], Subject(config, args)
    for peer in wanted(args):
        found = peer_lines(subject, peer)
        if peer == 'float':
            subject.float_ap = found[0].get('AP')
        lines += found
        write_csv(args.out, lines, FIELDS)
    return lines


def lines_of_process(config: Path, args: argparse.Namespace) -> list[dict]:
    """All lines of a detector, from a process of its own: torch's layers may not come behind NNCF's of the one before.

    A peer that ends the process leaves a line that says so.
    """
    part = args.work_dir.resolve() / config.stem / 'lines.csv'
    part.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(config), '--out', str(part), '--peers', *args.peers]
    for option in ('images', 'seed', 'preset', 'pairs', 'work_dir'):
        command += [f'--{option.replace("_", "-")}', str(getattr(args, option))]
    if args.cfg_options:
        command += ['--cfg-options', *args.cfg_options]
    code = subprocess.run(command).returncode
    lines = []
    if part.is_file():
        with part.open(encoding='utf-8', newline='') as file:
            lines = list(csv.DictReader(file))
    missing = [peer for peer in wanted(args) if peer not in {line['peer'] for line in lines}]
    return lines + [
        dict(detector=config.stem, peer=peer, note=f'failed: its process ended with {code}') for peer in missing
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--peers', nargs='+', default=list(PEERS), choices=list(PEERS))
    parser.add_argument('--images', type=int, default=128, help='calibration images')
    parser.add_argument('--seed', type=int, default=0, help='of the draw of the calibration images')
    parser.add_argument('--preset', default='w8a8', help='what ours starts from')
    parser.add_argument('--pairs', type=int, default=40, help='pairs of float and int8 runs that are timed')
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'peers')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='changes to every config')
    args = parser.parse_args(argv)
    lines: list[dict] = []
    for config in args.configs:
        lines += lines_of(config, args) if len(args.configs) == 1 else lines_of_process(config, args)
        write_csv(args.out, lines, FIELDS)
    troubles = [line for line in lines if (line.get('note') or '').startswith(('skipped', 'failed'))]
    for line in troubles:
        print(f'{line["detector"]}, {line["peer"]}: {line["note"]}')
    if any(line['note'].startswith('failed') for line in troubles):
        sys.exit(1)


if __name__ == '__main__':
    one_sentence(main)
