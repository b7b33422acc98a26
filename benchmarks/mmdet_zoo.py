"""Every architecture of mmdet's own configs through quantization and export: one line of a CSV each.

python benchmarks/mmdet_zoo.py                     # hours; a second run takes over what is there
python benchmarks/mmdet_zoo.py --only retinanet    # those with this in their name, again
python benchmarks/mmdet_zoo.py --failed            # those that were not equal everywhere, again
python benchmarks/mmdet_zoo.py --page              # only writes docs/support.md from the CSV

benchmarks/zoo_trial.py says what is done with each. Random weights, one image, one thread.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from runs import ROOT, VERSIONS
from zoo_architectures import find_architectures

from mmdet_ptq.analysis import versions
from mmdet_ptq.files import write_text

FOLDER = ROOT / 'benchmarks' / 'mmdet_zoo'
TABLE, ARCHITECTURES, UNBUILT = FOLDER / 'results.csv', FOLDER / 'architectures.csv', FOLDER / 'unbuilt.csv'
TRIAL = ROOT / 'benchmarks' / 'zoo_trial.py'
TOLD = ('state', 'layers', 'codes', 'decibel', 'reason')
RUNTIMES = ('onnxruntime', 'openvino')
FIELDS = (
    'config',
    'configs',
    'million',
    'size',
    'predicts',
    'quantized',
    'integer_mac_share',
    'reloaded',
    'global_loss',
    *(f'{runtime}_{key}' for runtime in RUNTIMES for key in TOLD),
    'seconds',
    'peak_gib',
    'date',
    *VERSIONS,
    *RUNTIMES,
)


def read_csv(path: Path) -> list[dict]:
    """Lines of a table; none where there is no file."""
    return list(csv.DictReader(path.open(newline=''))) if path.is_file() else []


def write_csv(path: Path, fields: Iterable[str], lines: Iterable[dict]) -> None:
    """Writes a table, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(fields), lineterminator='\n', restval='', extrasaction='ignore')
    writer.writeheader()
    writer.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def architectures() -> list[dict]:
    """The distinct architectures, found once."""
    if not ARCHITECTURES.is_file():
        found, unbuilt = find_architectures()
        write_csv(UNBUILT, ('config', 'reason'), (dict(config=c, reason=r) for c, r in sorted(unbuilt.items())))
        write_csv(ARCHITECTURES, ('config', 'configs', 'million', 'key'), map(asdict, found))
    return read_csv(ARCHITECTURES)


def try_one(config: str, timeout: float) -> dict:
    """One architecture, in a process of its own."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), *_python_path()])}
    try:
        run = subprocess.run(
            [sys.executable, str(TRIAL), config], capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return dict(config=config, quantized=f'took more than {timeout:.0f} s')
    try:
        return json.loads(run.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        told = (run.stderr.strip().splitlines() or [''])[-1][:200]
        return dict(config=config, quantized=f'the process ended with {run.returncode}: {told}')


def _python_path() -> list[str]:
    return [path for path in os.environ.get('PYTHONPATH', '').split(os.pathsep) if path]


def is_equal(line: dict) -> bool:
    """Whether everything that was tried holds."""
    states = (line.get(f'{runtime}_state') for runtime in RUNTIMES)
    return not line.get('quantized') and not line.get('reloaded') and all(state == 'equal' for state in states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', default=[], help='those whose config has one of these in its name')
    parser.add_argument('--failed', action='store_true', help='those that were not equal everywhere, again')
    parser.add_argument('--page', action='store_true', help='writes the page, and runs nothing')
    parser.add_argument('--timeout', type=float, default=900, help='seconds for each; default %(default)s')
    args = parser.parse_args()
    known = {line['config']: line for line in read_csv(TABLE)}
    if not args.page:
        # what stands for most configs first
        for found in sorted(architectures(), key=lambda a: -int(a['configs'])):
            config, line = found['config'], known.get(found['config'])
            again = any(name in config for name in args.only) or (args.failed and line and not is_equal(line))
            if args.only and not again or line and not again:
                continue
            line = try_one(config, args.timeout)
            told = versions()
            line |= {key: found[key] for key in ('configs', 'million')} | {key: told.get(key, '') for key in VERSIONS}
            line |= {key: told.get(key, '') for key in RUNTIMES}
            line['date'] = datetime.now(timezone.utc).date().isoformat()
            known[config] = line
            write_csv(TABLE, FIELDS, (known[key] for key in sorted(known)))
            states = ', '.join(f'{runtime} {line.get(f"{runtime}_state", "-")}' for runtime in RUNTIMES)
            why = [line.get(k) for k in ('predicts', 'quantized', *(f'{runtime}_reason' for runtime in RUNTIMES))]
            print(config, states, *dict.fromkeys(w for w in why if w), flush=True)


if __name__ == '__main__':
    main()
