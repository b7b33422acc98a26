"""AP against time: what each `ptq.dataflow` costs and gains, beside float and other tools, in one run.

python benchmarks/frontier.py --detectors rtmdet yolox efficientnet --out docs/results/frontier.csv

The detectors are those of the conformance suite (benchmarks/conformance.py). All models of a runtime are timed in turn,
round by round, so that what else the machine does meets them all. Lines of other detectors in --out are kept. With
--resume, models and AP are taken over, and the times are measured again. NNCF (``pip install nncf``) gets a line that
says so where it is missing.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from conformance import ZOO, config_of, options_of
from latency import example
from mmengine.dataset import pseudo_collate
from peer_models import package_version, quantize_nncf, quantize_onnxruntime
from peers import RUNTIMES, Subject
from runs import ROOT, one_sentence, write_csv
from runs import VERSIONS as PACKAGES

from mmdet_ptq import quantize
from mmdet_ptq.analysis import versions
from mmdet_ptq.deploy import get_runtime, open_model, with_runtime
from mmdet_ptq.errors import PTQError

FLOAT, NONE = 'float', 'none'
# what runs between the layers, by runtime; the first is what a run takes there
DATAFLOWS = dict(onnxruntime=('balanced', 'accuracy', 'speed'), openvino=(NONE, 'balanced', 'accuracy', 'speed'))
PEERS = dict(onnxruntime=('quantize_static', quantize_onnxruntime), openvino=('nncf', quantize_nncf))
# what a model's lines say besides times
ABOUT = ('AP', 'drop_points', 'integer_convolutions', 'convolutions', 'calibration_seconds', 'calibration_cpu_seconds')
PAUSE = 0.02  # seconds, after which no thread of another model waits in a loop for work any more
FIELDS = (
    'detector',
    'runtime',
    'model',
    'AP',
    'drop_points',
    'threads',
    'fastest_ms',
    'median_ms',
    'ratio',
    'median_ratio',
    'peer_ratio',
    'rounds',
    'integer_convolutions',
    'convolutions',
    'calibration_seconds',
    'calibration_cpu_seconds',
    'calibration_images',
    'seed',
    'load',
    'note',
    'date',
    *PACKAGES,
    'onnxruntime',
    'openvino',
    'nncf',
    'command',
)


class Models:
    """Every model of one detector.

    Args:
        subject: The detector.
        args: The command line.
        known: Lines of an earlier run whose models are taken over.

    Attributes:
        paths: Runtime and name to the file.
        about: The same to what its lines say besides times.
    """

    def __init__(self, subject: Subject, args: argparse.Namespace, known: Sequence[dict] = ()) -> None:
        self.subject, self.args = subject, args
        self.paths: dict[tuple[str, str], Path] = {}
        self.about: dict[tuple[str, str], dict] = {}
        if known:
            for line in known:
                key = line['runtime'], line['model']
                self.about[key] = {name: line[name] for name in (*ABOUT, 'note') if line[name]}
                path = self._path(*key)
                if path.is_file():
                    self.paths[key] = path
            return
        for runtime in args.runtimes:
            self.paths[runtime, FLOAT] = subject.float_model(runtime)
            self.about[runtime, FLOAT] = {}
        for runtime in args.runtimes:
            self._add_peer(runtime)
        for dataflow in dict.fromkeys(name for runtime in args.runtimes for name in DATAFLOWS[runtime]):
            if dataflow in args.dataflows:
                self._add_ours(dataflow)

        for (runtime, name), path in self.paths.items():
            self._evaluate(runtime, name, path)

    def _path(self, runtime: str, name: str) -> Path:
        return self.subject.folder / name / runtime / f'model{get_runtime(runtime).suffix}'

    def _add_peer(self, runtime: str) -> None:
        name, maker = PEERS[runtime]
        path = self._path(runtime, name)
        images = self.subject.images  # drawn and loaded before the clock runs
        try:
            _, told = timed(lambda: maker(self.paths[runtime, FLOAT], path, images))
        except PTQError as error:
            self.about[runtime, name] = dict(note=f'skipped: {error}')
            return
        self.paths[runtime, name], self.about[runtime, name] = path, told

    def _add_ours(self, dataflow: str) -> None:
        subject = self.subject
        loader = [pseudo_collate([copy.deepcopy(sample)]) for sample in subject.samples]
        block = {} if dataflow == NONE else dict(dataflow=dataflow)
        detector, told = timed(lambda: quantize(subject.detector, loader, self.args.preset, ptq=block))
        for runtime in self.args.runtimes:
            if dataflow in DATAFLOWS[runtime]:
                folder = self._path(runtime, dataflow).parent
                path = get_runtime(runtime).export(copy.deepcopy(detector), folder, subject.images[0].shape)
                self.paths[runtime, dataflow], self.about[runtime, dataflow] = path, dict(told)

    def _evaluate(self, runtime: str, name: str, path: Path) -> None:
        subject, model = self.subject, open_model(path, threads=1)
        coverage, about = model.coverage(), self.about[runtime, name]
        integer = len(coverage.integer)
        about.update(integer_convolutions=integer, convolutions=integer + len(coverage.float))
        if self.args.evaluate:
            about['AP'] = subject.evaluate(with_runtime(copy.deepcopy(subject.detector), model, subject.cfg))
            about['drop_points'] = round(100 * (self.about[runtime, FLOAT]['AP'] - about['AP']), 1)
        print(f'{subject.name}, {runtime}, {name}: {about}', flush=True)


def timed(run: Callable[[], object]) -> tuple[object, dict]:
    """What a function returns, and how long it took: seconds say little on a busy machine, those of the process do."""
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, dict(
        calibration_seconds=round(time.perf_counter() - start, 1),
        calibration_cpu_seconds=round(time.process_time() - cpu, 1),
    )


def times_in_turn(runs: dict[str, Callable[[], object]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds of every model in every round, the first of a round changing each time."""
    found, names = {name: [] for name in runs}, list(runs)
    for run in runs.values():
        for _ in range(3):
            run()
    for number in range(rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            if threads > 1:
                time.sleep(PAUSE)
                runs[name]()  # what was idle is slow at first
            start = time.perf_counter()
            runs[name]()
            found[name].append(1e3 * (time.perf_counter() - start))
    return found


def lines_of(subject: Subject, args: argparse.Namespace, known: Sequence[dict]) -> list[dict]:
    """All lines of a detector."""
    models, lines = Models(subject, args, known), []
    for runtime in args.runtimes:
        paths = {name: path for (where, name), path in models.paths.items() if where == runtime}
        peer, image = PEERS[runtime][0], example(open_model(paths[FLOAT]))
        for threads in args.threads:
            opened = {name: open_model(path, threads) for name, path in paths.items()}
            runs = {name: partial(model, image) for name, model in opened.items()}
            times, load = times_in_turn(runs, args.rounds, threads), round(os.getloadavg()[0], 1)
            for name, taken in times.items():
                line = dict(
                    runtime=runtime,
                    model=name,
                    threads=threads,
                    fastest_ms=round(min(taken), 3),
                    median_ms=round(statistics.median(taken), 3),
                    ratio=round(min(times[FLOAT]) / min(taken), 2),
                    median_ratio=round(statistics.median(a / b for a, b in zip(times[FLOAT], taken, strict=True)), 2),
                    peer_ratio=round(min(times[peer]) / min(taken), 2) if peer in times else None,
                    rounds=args.rounds,
                    load=load,
                    **models.about[runtime, name],
                )
                lines.append(complete(subject, line, args))
        lines += [
            complete(subject, dict(runtime=runtime, model=name, **told), args)
            for (where, name), told in models.about.items()
            if where == runtime and name not in paths
        ]
    return lines


def complete(subject: Subject, line: dict, args: argparse.Namespace) -> dict:
    """Adds what every line says."""
    known = versions()
    options = ['--detectors', subject.name, '--images', str(args.images), '--rounds', str(args.rounds)]
    options += ['--dataflows', *args.dataflows, '--threads', *map(str, args.threads)]
    return dict(
        detector=subject.name,
        calibration_images=args.images,
        seed=args.seed,
        **line,
        date=datetime.now(timezone.utc).date().isoformat(),
        **{name: known[name] for name in PACKAGES},
        **{name: package_version(name) for name in ('onnxruntime', 'openvino', 'nncf')},
        command=' '.join(['python', 'benchmarks/frontier.py', *options, '--seed', str(args.seed)]),
    )


def read_lines(path: Path) -> list[dict]:
    """What a file of an earlier run holds."""
    if not path.is_file():
        return []
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


def table(lines: Sequence[dict]) -> str:
    """The lines in Markdown: a row for each model, in brackets how many times as fast as the other tool's model."""
    rows: dict[tuple, dict[str, dict]] = {}
    for line in lines:
        if line.get('threads'):
            rows.setdefault((line['detector'], line['runtime'], line['model']), {})[str(line['threads'])] = line
    threads = sorted({count for found in rows.values() for count in found}, key=int)
    head = ['detector', 'runtime', 'model', 'AP', 'points', *(f'{count} thread(s)' for count in threads)]
    out = [head, ['---'] * 3 + ['---:'] * (len(head) - 3)]
    for key, found in rows.items():
        told = next(iter(found.values()))
        cells = ['', '']
        if told.get('AP'):
            cells = [f'{float(told["AP"]):.3f}', f'{-float(told["drop_points"]) or 0.0:+.1f}']
        for count in threads:
            line = found.get(count, {})
            peer = f' ({float(line["peer_ratio"]):.2f})' if line.get('peer_ratio') else ''
            cells.append(f'{float(line["ratio"]):.2f}{peer}' if line else '')
        out.append([*key, *cells])
    return '\n'.join(f'| {" | ".join(row)} |' for row in out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--detectors', nargs='+', required=True, help='members of the conformance suite')
    parser.add_argument('--images', type=int, default=64, help='calibration images')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--preset', default='w8a8_observe')
    parser.add_argument('--runtimes', nargs='+', default=list(RUNTIMES), choices=list(RUNTIMES))
    known = list(dict.fromkeys(name for names in DATAFLOWS.values() for name in names))
    parser.add_argument('--dataflows', nargs='+', default=known, choices=known)
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--rounds', type=int, default=60)
    parser.add_argument('--no-evaluation', dest='evaluate', action='store_false', help='times alone')
    parser.add_argument('--resume', action='store_true', help='take over models and AP of --work-dir and --out')
    parser.add_argument('--zoo', type=Path, default=ZOO, help='folder of the detector zoo')
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'frontier')
    args = parser.parse_args(argv)
    args.out, args.zoo, args.work_dir = args.out.resolve(), args.zoo.resolve(), args.work_dir.resolve()
    os.chdir(ROOT)  # where the data of the configs lie
    sys.path.append(str(args.zoo))  # its plug-ins
    for name in args.detectors:
        config = config_of(name, args.zoo)
        if config is None:
            raise PTQError(f'there is no config of {name!r}; name a member of the suite, or set --zoo.')
        args.cfg_options = options_of(config, 'whole')
        subject, before = Subject(config, args), read_lines(args.out)
        known = [line for line in before if line['detector'] == name and args.resume]
        lines = [line for line in before if line['detector'] != name] + lines_of(subject, args, known)
        write_csv(args.out, lines, FIELDS)
    print(table(read_lines(args.out)))


if __name__ == '__main__':
    one_sentence(main)
