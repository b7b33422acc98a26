"""Trained detectors of many families against their reference figures: prints what fell, and fails if something did.

python benchmarks/conformance.py                          # every row of the table: hours
python benchmarks/conformance.py --detectors rtmdet yolox
python benchmarks/conformance.py --runtimes float         # minutes: only the float detectors, nothing is quantized
python benchmarks/conformance.py --part quick             # a minute; `make test` does the same
python benchmarks/conformance.py --update                 # writes what was measured into the table

The rows are those of benchmarks/conformance/table.csv, docs/conformance.md says what they mean. The configs and weights
of the small detectors lie beside it. Those of the zoo are skipped without a zoo (MMDET_PTQ_ZOO, or --zoo).
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import runs
from runs import ROOT, one_sentence, run_ptq, write_csv

from mmdet_ptq.analysis import versions
from mmdet_ptq.cli import load_config
from mmdet_ptq.deploy import get_runtime
from mmdet_ptq.engine import evaluate
from mmdet_ptq.errors import PTQError, did_you_mean

FOLDER = ROOT / 'benchmarks' / 'conformance'
TABLE = FOLDER / 'table.csv'
CONFIGS = (FOLDER / 'configs', ROOT / 'configs')
ZOO = Path(os.environ.get('MMDET_PTQ_ZOO', ROOT.parent / 'shared' / 'zoo'))
VERSIONS = (*runs.VERSIONS, 'onnxruntime', 'openvino', 'ncnn')
KEY = ('detector', 'part', 'preset', 'runtime', 'metric')
FIELDS = (*KEY, 'reference', 'tolerance_points', 'date', *VERSIONS)
RESULT_FIELDS = (
    *KEY,
    'reference',
    'figure',
    'change_points',
    'cost_points',
    'latency_ratio',
    'state',
    'date',
    *VERSIONS,
)
PARTS = ('whole', 'quick')
WITHOUT_EXPORT = ('float', 'simulated')
# what 8 bits may cost a detector, and all of them on the mean, in points
MOST, MOST_ON_MEAN = 0.5, 0.3
# the drawn images of the quick part: the first ones of the whole data set
QUICK_ROOT, QUICK_IMAGES = 'data/embedded_quick', dict(train=16, val=20)


@dataclass
class Outcome:
    """What became of a row.

    Args:
        row: The row of the table.
        figure: What was measured; None where nothing was.
        cost: Points below the float figure of the same run, negative where above it; None without a figure.
        latency_ratio: Float time / int8 time in the runtime; None where it was not timed.
        reason: Why nothing was measured.
        skipped: Whether that is as it should be: something is not installed.
    """

    row: dict
    figure: float | None = None
    cost: float | None = None
    latency_ratio: float | None = None
    reason: str = ''
    skipped: bool = False

    @property
    def change(self) -> float | None:
        """Points above the reference; None where one of both is missing."""
        if self.figure is None or not self.row['reference']:
            return None
        return round(100 * (self.figure - float(self.row['reference'])), 1)

    @property
    def state(self) -> str:
        """'fell', 'rose', 'same', 'no reference', 'failed' or 'skipped'."""
        if self.figure is None:
            return 'skipped' if self.skipped else 'failed'
        if self.change is None:
            return 'no reference'
        if abs(self.change) <= float(self.row['tolerance_points']):
            return 'same'
        return 'fell' if self.change < 0 else 'rose'


def read_table(path: Path) -> list[dict]:
    """The rows of the table."""
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


def select(rows: Sequence[dict], **wanted: Sequence[str] | None) -> list[dict]:
    """The rows whose columns have the wanted values; None wants all.

    Raises:
        PTQError: No row of the table has one of them.
    """
    for column, values in wanted.items():
        known = dict.fromkeys(row[column] for row in rows)
        for value in values or ():
            if value not in known:
                raise PTQError(
                    f'no row of the table has the {column} {value!r}; there are {", ".join(known)}.'
                    f'{did_you_mean(value, known)}'
                )
    return [row for row in rows if all(values is None or row[column] in values for column, values in wanted.items())]


def config_of(detector: str, zoo: Path) -> Path | None:
    """The config of a detector; None where it is one of a zoo that is not there."""
    found = [folder / f'{detector}.py' for folder in (*CONFIGS, zoo / 'configs')]
    return next((path for path in found if path.is_file()), None)


def options_of(config: Path, part: str) -> list[str]:
    """What a config needs besides a preset: the weights, and the images of the part."""
    weights = FOLDER / 'weights' / f'{config.stem}.pth'
    options = [f'load_from={weights}'] if config.parent == CONFIGS[0] else []
    if part == 'quick':
        for split in ('train', 'val', 'test'):
            options.append(f'{split}_dataloader.dataset.data_root={QUICK_ROOT}')
            options += [f'{split}_dataloader.dataset.num_images.{key}={count}' for key, count in QUICK_IMAGES.items()]
            if split != 'train':
                options.append(f'{split}_evaluator.ann_file={QUICK_ROOT}/annotations/instances_val.json')
        # nothing is exported, which would take most of the time, but what a runtime needs is quantized
        options += [f'ptq.calibration.num_images={QUICK_IMAGES["train"]}', 'ptq.dataflow=auto']
    return options


def float_metrics(config: Path, options: Sequence[str], work_dir: Path) -> dict:
    """Figures of a float detector, without quantizing it."""
    from mmdet.apis import init_detector

    cfg = load_config(str(config), [option for option in options if not option.startswith('ptq.')])
    cfg.work_dir, cfg.log_level = str(work_dir), 'ERROR'
    with (work_dir / 'output.txt').open('w') as file, redirect_stdout(file):
        return evaluate(cfg, init_detector(cfg, cfg.load_from, device='cpu'))


def what_broke(path: Path) -> str:
    """The sentence or the exception with which a failed run ended; its last line where there is none."""
    text = path.read_text(encoding='utf-8', errors='replace').strip()
    # the message may begin on the line below the exception's name, and a list of frames may follow it
    found = re.findall(r'^(?:error|[\w.]*(?:Error|Exception|Interrupt)):\s+\S.*$', text, re.MULTILINE)
    return ' '.join((found or text.splitlines()[-1:] or ['it printed nothing'])[-1].split())


def measure(config: Path, rows: Sequence[dict], export: Sequence[str], work_dir: Path) -> list[Outcome]:
    """Runs one detector with one preset; an outcome for each row.

    Where a run with several runtimes fails, each of them is tried by itself: a row does not fail for another's sake.

    Args:
        config: The config.
        rows: Rows of the table that differ in runtime and metric alone.
        export: Runtimes that it is calibrated for.
        work_dir: Where it runs; what is finished there is taken over.
    """
    part, preset, output = rows[0]['part'], rows[0]['preset'], work_dir / 'output.txt'
    work_dir.mkdir(parents=True, exist_ok=True)
    options = options_of(config, part)
    if {row['runtime'] for row in rows} == {'float'}:
        try:
            metrics = float_metrics(config, options, work_dir)
        except Exception as error:  # of any kind: a detector that breaks fails its own rows alone
            return [Outcome(row, reason=f'{type(error).__name__}: {error}') for row in rows]
        return [Outcome(row, metrics[row['metric']], 0.0) for row in rows]
    options.append(f'ptq.export=[{",".join(export)}]')
    try:
        _, results = run_ptq(config, preset, work_dir, options, output=output)
    except subprocess.CalledProcessError as error:
        if len(export) < 2:
            # a signal has a negative number
            return [Outcome(row, reason=f'exit code {error.returncode}: {what_broke(output)}') for row in rows]
        best = {}
        for name in export:
            own = [row for row in rows if row['runtime'] in (*WITHOUT_EXPORT, name)]
            for outcome in measure(config, own, [name], work_dir / f'{name}_alone') if own else ():
                key = tuple(outcome.row[name] for name in KEY)
                # what needs no export from the first run that gave it
                if key not in best or best[key].figure is None:
                    best[key] = outcome
        return list(best.values())
    found, outcomes = {row['model']: row for row in results['rows']}, []
    for row in rows:
        entry, metric = found[row['runtime']], row['metric']
        figure = entry['metrics'][metric]
        cost = round(100 * (found['float']['metrics'][metric] - figure), 1)
        outcomes.append(Outcome(row, figure, cost, entry['latency_ratio']))
    return outcomes


def by_run(rows: Iterable[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """Rows that one run gives, by detector, part and preset."""
    groups = {}
    for row in rows:
        groups.setdefault((row['detector'], row['part'], row['preset']), []).append(row)
    return groups


def outcomes_of(rows: Sequence[dict], table: Sequence[dict], args: argparse.Namespace) -> Iterable[Outcome]:
    """Outcomes of the rows, run by run.

    Args:
        rows: The rows.
        table: All of the table: a detector is calibrated for all runtimes that it has there, whichever are asked for.
        args: The command line.
    """
    missing = {}
    for name in {row['runtime'] for row in table}.difference(WITHOUT_EXPORT):
        try:
            get_runtime(name).check()
        except PTQError as error:
            missing[name] = str(error)
    whole = by_run(table)
    for key, group in by_run(rows).items():
        config = config_of(key[0], args.zoo)
        if config is None:
            reason = (
                f'there is no {key[0]}.py in {args.zoo / "configs"}; set MMDET_PTQ_ZOO or --zoo to the detector zoo'
            )
            yield from (Outcome(row, reason=reason, skipped=True) for row in group)
            continue
        here = [row for row in group if row['runtime'] not in missing]
        export = dict.fromkeys(
            row['runtime'] for row in whole[key] if row['runtime'] not in (*WITHOUT_EXPORT, *missing)
        )
        work_dir = args.work_dir.joinpath(*key)
        if not args.resume:
            shutil.rmtree(work_dir, ignore_errors=True)
        print(f'{" ".join(key)}: {", ".join(dict.fromkeys(row["runtime"] for row in here))} ...', flush=True)
        yield from measure(config, here, list(export), work_dir) if here else ()
        yield from (
            Outcome(row, reason=missing[row['runtime']], skipped=True) for row in group if row['runtime'] in missing
        )


def told(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return '-' if value is None else format(value, form)


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Prints a line for each row, what 8 bits cost in each runtime, and last what fell."""
    line = '{:<22}{:<7}{:<14}{:<13}{:<16}{:>10}{:>8}{:>8}{:>7}{:>7}  {}'
    print(line.format(*KEY, 'reference', 'now', 'change', 'cost', 'speed', ''))
    for entry in outcomes:
        print(
            line.format(
                *(entry.row[name] for name in KEY),
                entry.row['reference'] or '-',
                told(entry.figure, '.3f'),
                told(entry.change, '+.1f'),
                told(entry.cost, '.1f'),
                told(entry.latency_ratio, '.2f'),
                entry.state,
            )
        )
    for (preset, runtime), costs in costs_by_runtime(outcomes).items():
        mean = sum(costs.values()) / len(costs)
        over = [f'{name} {cost:.1f}' for name, cost in costs.items() if cost > MOST]
        print(
            f'{preset} in {runtime} costs {mean:.2f} points on the mean of {len(costs)} (at most {MOST_ON_MEAN} wanted)'
            + (f'; more than {MOST}: {", ".join(over)}' if over else f'; none more than {MOST}')
        )
    for state in ('skipped', 'failed', 'rose', 'fell'):
        for entry in outcomes:
            if entry.state == state:
                what = ' '.join(entry.row[name] for name in KEY)
                why = entry.reason or f'{entry.row["reference"]} to {entry.figure:.3f}, {entry.change:+.1f} points'
                print(f'{state.upper()} {what}: {why}')


def costs_by_runtime(outcomes: Iterable[Outcome]) -> dict[tuple[str, str], dict[str, float]]:
    """Points that each detector of the whole part lost, by preset and runtime."""
    costs = {}
    for entry in outcomes:
        row = entry.row
        if row['part'] == 'whole' and row['metric'] == runs.METRIC and row['runtime'] != 'float':
            if entry.cost is not None:
                costs.setdefault((row['preset'], row['runtime']), {})[row['detector']] = entry.cost
    return costs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--detectors', nargs='+', help='default: all of the table')
    parser.add_argument('--runtimes', nargs='+', help='default: all of the table; float and simulated are two of them')
    parser.add_argument('--presets', nargs='+', help='default: all of the table')
    parser.add_argument('--part', choices=PARTS, default='whole', help='quick: a detector, few images; default: whole')
    parser.add_argument('--table', type=Path, default=TABLE)
    parser.add_argument('--zoo', type=Path, default=ZOO, help='folder of the detector zoo')
    parser.add_argument('--update', action='store_true', help='write the figures measured into the table as references')
    parser.add_argument('--out', type=Path, help='CSV file; default: results.csv in --work-dir')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'conformance')
    parser.add_argument(
        '--resume', action='store_true', help='take over finished stages; only where no code has changed since'
    )
    args = parser.parse_args(argv)
    table, out = read_table(args.table), (args.out or args.work_dir / 'results.csv').resolve()
    args.table, args.zoo, args.work_dir = args.table.resolve(), args.zoo.resolve(), args.work_dir.resolve()
    rows = select(select(table, part=[args.part]), detector=args.detectors, runtime=args.runtimes, preset=args.presets)
    if not rows:
        raise PTQError(f'no row of {args.table.name} has all that was asked for; leave out an option.')
    # where the data of the configs lie
    os.chdir(ROOT)
    # the plug-ins of the zoo
    paths = [str(args.zoo), *filter(None, [os.environ.get('PYTHONPATH')])]
    os.environ['PYTHONPATH'] = os.pathsep.join(paths)
    sys.path.append(str(args.zoo))

    installed = versions()
    about = dict(
        date=datetime.now(timezone.utc).date().isoformat(), **{name: installed.get(name, '') for name in VERSIONS}
    )
    print(f'on {installed["processor"]}')
    outcomes = []
    for entry in outcomes_of(rows, table, args):
        outcomes.append(entry)
        write_csv(out, [result(entry, about) for entry in outcomes], RESULT_FIELDS)
    print_outcomes(outcomes)
    if args.update:
        for entry in outcomes:
            if entry.figure is not None:
                entry.row.update(reference=f'{entry.figure:.3f}', **about)
        write_csv(args.table, table, FIELDS)
    return any(entry.state in ('fell', 'failed') for entry in outcomes)


def result(entry: Outcome, about: dict) -> dict:
    """An outcome as a line of the results."""
    return dict(
        **{name: entry.row[name] for name in (*KEY, 'reference')},
        figure=told(entry.figure, '.3f'),
        change_points=told(entry.change, '.1f'),
        cost_points=told(entry.cost, '.1f'),
        latency_ratio=told(entry.latency_ratio, '.2f'),
        state=entry.state,
        **about,
    )


if __name__ == '__main__':
    one_sentence(lambda: sys.exit(main()))
