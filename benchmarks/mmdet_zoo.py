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
import multiprocessing
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from runs import ROOT, VERSIONS
from zoo_architectures import find_architectures
from zoo_trial import DECIBEL, trial

from mmdet_ptq.analysis import versions
from mmdet_ptq.files import write_text

FOLDER = ROOT / 'benchmarks' / 'mmdet_zoo'
TABLE, ARCHITECTURES, UNBUILT = FOLDER / 'results.csv', FOLDER / 'architectures.csv', FOLDER / 'unbuilt.csv'
PAGE = ROOT / 'docs' / 'support.md'
# processes that have imported everything before they are born
_TRIALS = multiprocessing.get_context('forkserver')
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
    # where outputs are not near from the image on
    'onnxruntime_followed',
    'onnxruntime_itself',
    'seconds',
    'peak_gib',
    'date',
    'commit',
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


def try_one(config: str, timeout: float, runtimes: Sequence[str] = RUNTIMES) -> dict:
    """One architecture, in a process of its own."""
    receiver, sender = _TRIALS.Pipe(duplex=False)
    process = _TRIALS.Process(target=_send_trial, args=(config, int(timeout), runtimes, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        return dict(quantized=f'took more than {timeout:.0f} s' if late else f'ended with {process.exitcode}')
    finally:
        process.join()


def _send_trial(config: str, seconds: int, runtimes: Sequence[str], sender: Connection) -> None:
    # of this process, however many others there are
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sender.send(trial(config, Path(folder), runtimes))


def is_equal(line: dict) -> bool:
    """Whether everything that was tried holds."""
    states = (line.get(f'{runtime}_state') for runtime in RUNTIMES)
    return not line.get('quantized') and not line.get('reloaded') and all(state == 'equal' for state in states)


def worth_trying(args: argparse.Namespace, known: dict[str, dict]) -> list[dict]:
    """Architectures that are to be tried, those that stand for most configs first, and the smallest of these."""
    chosen = []
    for found in sorted(architectures(), key=lambda a: (-int(a['configs']), float(a['million']))):
        config, line = found['config'], known.get(found['config'])
        named = any(name in config for name in args.only)
        again = named or (args.failed and line is not None and not is_equal(line))
        if again or (line is None and not args.only):
            chosen.append(found)
    return chosen


def commit() -> str:
    """What this clone stands at; '' in none."""
    command = ['git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD']
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def told_of(found: dict, line: dict) -> dict:
    """The whole line of an architecture."""
    told = versions()
    line |= {key: found[key] for key in ('config', 'configs', 'million')}
    line |= {key: told.get(key, '') for key in (*VERSIONS, *RUNTIMES)}
    return line | dict(date=datetime.now(timezone.utc).date().isoformat(), commit=commit())


def reasons(line: dict) -> list[str]:
    """Why something of an architecture did not hold, each once."""
    keys = ('predicts', 'quantized', 'reloaded', 'global_loss', *(f'{runtime}_reason' for runtime in RUNTIMES))
    return list(dict.fromkeys(line[key] for key in keys if line.get(key)))


def page(lines: list[dict], unbuilt: list[dict], wanted: list[dict]) -> str:
    """docs/support.md.

    Args:
        lines: What was tried.
        unbuilt: Configs that do not build, and why.
        wanted: All architectures.
    """
    predicting = [line for line in lines if not line['predicts']]
    total = sum(int(line['configs']) for line in predicting)

    def counted(chosen: list[dict]) -> str:
        return f'{len(chosen)} of {len(predicting)} | {sum(int(line["configs"]) for line in chosen)} of {total}'

    quantized = [line for line in predicting if not line['quantized']]
    rows = {
        'quantize': quantized,
        'predict the same after they were saved and loaded': [line for line in quantized if not line['reloaded']],
        'take a step of the global loss': [line for line in quantized if not line['global_loss']],
        'compute in ONNX Runtime what was simulated': [x for x in predicting if x['onnxruntime_state'] == 'equal'],
        'compute in OpenVINO what was simulated': [x for x in predicting if x['openvino_state'] == 'equal'],
        'all of this': [line for line in predicting if is_equal(line) and not line['global_loss']],
    }
    first = lines[0] if lines else {}
    processors = ' and '.join(sorted({line['processor'] for line in lines}))
    left = [a for a in wanted if a['config'] not in {line['config'] for line in lines}]
    missing = f'{len(left)} architectures ({sum(int(a["configs"]) for a in left)} configs) were not tried yet. '
    text = [
        _HEAD + (missing if left else '') + 'Of those that predict on a CPU with random weights:\n',
        '| | architectures | configs |',
        '|---|---:|---:|',
    ]
    text += [f'| {what} | {counted(chosen)} |' for what, chosen in rows.items()]
    text += [
        '',
        f'mmdet {first.get("mmdet")}, torch {first.get("torch")}, ONNX Runtime {first.get("onnxruntime")}, OpenVINO '
        f'{first.get("openvino", "").partition("-")[0]}, {processors}, '
        f'{max((line["date"] for line in lines), default="")}.',
        '',
        '## What does not hold, and why',
        '',
        '| config | configs | what is said |',
        '|---|---:|---|',
    ]
    text += [
        f'| {_linked(line)} | {line["configs"]} | {_told("; ".join(reasons(line)) or _differs(line))} |'
        for line in predicting
        if not is_equal(line) or line['global_loss']
    ]
    text += _noisy(predicting)
    text += ['', '## All architectures', '', *_table(predicting)]
    text += ['', '## Not tried', '', 'They do not predict on a CPU with random weights, or do not build.', '']
    text += ['| config | configs | why |', '|---|---:|---|']
    text += [f'| {_linked(x)} | {x["configs"]} | {_told(x["predicts"])} |' for x in lines if x['predicts']]
    text += [f'| {_linked(x)} | 1 | {_told(x["reason"])} |' for x in unbuilt]
    return '\n'.join(text) + '\n'


_HEAD = """# Detectors of mmdet

<!-- written by benchmarks/mmdet_zoo.py from benchmarks/mmdet_zoo/results.csv -->

Every config of mmdet's own was built. Configs that build detectors of the same classes are one architecture, tried
once, with the config that has the fewest weights. Weights are random, the image has 160 x 192 pixels or the next size
that the detector takes. Stages have one or two blocks, transformers two layers, cascades two stages; backbones and
heads are narrower than published where the config lets them. So the page says whether a family works, not how accurate
it is: [conformance](conformance.md) does.

"Computes what was simulated": each tensor of the exported model was compared with the simulation, from the same codes;
at least 99 % of the codes are equal in the worst tensor, and all outputs to at least 20 dB, in ONNX Runtime from the
image on; where they are not, but from the same codes, a table tells. Where an encoder chooses
queries by their scores (DINO), single codes change their order: in OpenVINO the simulation goes on with those that were
chosen there, of which 99 % have to be its own, too; in ONNX Runtime the mean of all tensors counts. A line stands until
its architecture is tried again (`--only`); its date and its commit are in the CSV.

```bash
python benchmarks/mmdet_zoo.py --jobs 2      # hours; goes on where it stopped
```

## Totals

"""

_NOISY = """In ONNX Runtime outputs of these differ from the simulation's, computed from the image on, although every
tensor and the outputs are equal where each is computed from the same codes. The last column tells how far the
simulation is from itself when last bits change at random in what its layer and group normalisations and deformable
convolutions return: float operations of two programs differ in these, a code falls to the other side of its boundary,
and random weights magnify it. Where that column is much higher than the first, this does not explain the difference,
and its cause is not known.
"""


def _table(lines: list[dict]) -> list[str]:
    """Integers: the share of multiply-accumulates; then, of each runtime, the layers that it computes in integers."""
    found = ['| config | configs | integers | ONNX Runtime | OpenVINO |', '|---|---:|---:|---|---|']
    for line in lines:
        share = line['integer_mac_share']
        states = [line[f'{r}_layers'] if line[f'{r}_state'] == 'equal' else line[f'{r}_state'] or '-' for r in RUNTIMES]
        found.append(
            f'| {_linked(line)} | {line["configs"]} | {f"{float(share):.1%}" if share else "-"} | '
            + ' | '.join(states)
            + ' |'
        )
    return found


def _noisy(lines: list[dict]) -> list[str]:
    """Those whose outputs are equal from the runtime's codes alone; nothing where there is none."""
    differing = [line for line in lines if line['onnxruntime_state'] == 'differs']
    noisy = [line for line in differing if float(line.get('onnxruntime_followed') or 0) >= DECIBEL]
    if not noisy:
        return []
    found = ['', '## Different from the image on, equal from the same codes', '', _NOISY]
    found += ['| config | configs | from the image | from the same codes | the simulation to itself |']
    found += ['|---|---:|---:|---:|---:|']
    return found + [
        f'| {_linked(line)} | {line["configs"]} | '
        + ' | '.join(f'{line[f"onnxruntime_{key}"]} dB' for key in ('decibel', 'followed', 'itself'))
        + ' |'
        for line in noisy
    ]


def _linked(line: dict) -> str:
    return f'`{line["config"].removesuffix(".py")}`'


def _differs(line: dict) -> str:
    return '; '.join(
        f'{runtime}: {_share(line[f"{runtime}_codes"])} of the codes, outputs to {line[f"{runtime}_decibel"]} dB'
        for runtime in RUNTIMES
        if line[f'{runtime}_state'] == 'differs'
    )


def _share(number: str) -> str:
    return f'{float(number):.2%}' if number else 'unknown'


def _told(sentence: str) -> str:
    return sentence.replace('|', '/').replace(str(ROOT), '').replace('<', '&lt;')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', default=[], help='those whose config has one of these in its name')
    parser.add_argument('--failed', action='store_true', help='those that were not equal everywhere, again')
    parser.add_argument('--page', action='store_true', help='writes the page, and runs nothing')
    parser.add_argument('--timeout', type=float, default=900, help='processor seconds for each; default %(default)s')
    parser.add_argument('--jobs', type=int, default=1, help='how many at once; default %(default)s')
    args = parser.parse_args()
    _TRIALS.set_forkserver_preload(['zoo_trial', 'onnxscript', 'onnxruntime', 'openvino'])
    known = {line['config']: line for line in read_csv(TABLE)}
    if not args.page:
        with ThreadPoolExecutor(args.jobs) as pool:
            running = {pool.submit(try_one, a['config'], args.timeout): a for a in worth_trying(args, known)}
            for done in as_completed(running):
                line = told_of(running[done], done.result())
                known[line['config']] = line
                write_csv(TABLE, FIELDS, (known[key] for key in sorted(known)))
                states = ', '.join(f'{runtime} {line.get(f"{runtime}_state", "-")}' for runtime in RUNTIMES)
                print(line['config'], states, *reasons(line), flush=True)
    write_text(PAGE, page(read_csv(TABLE), read_csv(UNBUILT), read_csv(ARCHITECTURES)))


if __name__ == '__main__':
    main()
