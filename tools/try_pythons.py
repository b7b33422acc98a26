#!/usr/bin/env python3
"""Sets up and runs the demo with the oldest and the newest supported Python that this machine has.

    python tools/try_pythons.py [--keep] [PYTHON ...]        PYTHON: other interpreters than these two

The newest Python gets the newest torch that can be fetched, all others the one of the set-up. Each gets an environment
of its own, which is removed afterwards. The program fails where a set-up or a demo fails, or where the integers lose
more than half a point; a Python whose torch cannot be fetched here is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setup_env import SUPPORTED, TORCH
from setup_parts import ROOT, probe, say

DEMO = ['tools/ptq.py', 'configs/ssdlite_mbv2_ptq.py', '--preset', 'w8a8_observe']
METRIC, LOST = 'coco/bbox_mAP', 0.005
# bytes for an environment and what pip keeps, and seconds for what is fetched
SPACE, PATIENCE = 25 * 2**30, 900


def ends() -> list[str]:
    """The oldest and the newest Python that work, of the search path and of pyenv."""
    pyenv = Path(os.environ.get('PYENV_ROOT') or Path.home() / '.pyenv')
    working = []
    for major, minor in SUPPORTED:
        name = f'python{major}.{minor}'
        places = [name, *map(str, sorted(pyenv.glob(f'versions/*/bin/{name}')))]
        working += [place for place in places if probe(place)][:1]
    return working[:1] + working[1:][-1:]


def fetched(python: str, torch: str) -> str | None:
    """The version of torch that is fetched for a Python, with what it needs; None where it is not all there.

    Nothing else of an environment is as large, or as often missing.

    Args:
        python: The interpreter.
        torch: What pip is asked for: ``torch``, or ``torch==2.13.0``.
    """
    if shutil.disk_usage(ROOT).free < SPACE:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [python, '-m', 'pip', 'download', '--quiet', '--dest', folder, torch]
        try:
            subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
            return None
        return next(Path(folder).glob('torch-*.whl')).name.split('-')[1].partition('+')[0]


def try_python(python: str, torch: str, keep: bool) -> str:
    """What went wrong with a Python and a version of torch, '' if nothing did."""
    name = Path(python).name
    venv, work_dir = ROOT / f'.venv-{name}', ROOT / 'work_dirs' / name
    environment = {**os.environ, 'PYTHON': shutil.which(python) or python, 'VENV': venv.name, 'TORCH': torch}
    command = [sys.executable, 'tools/setup_env.py', *DEMO, '--work-dir', str(work_dir)]
    try:
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            return 'the set-up or the demo failed'
        rows = json.loads((work_dir / 'results.json').read_text())['rows']
        figures = {row['model']: row['metrics'][METRIC] for row in rows}
        lost = {model: figures['float'] - figure for model, figure in figures.items() if model != 'float'}
        say(f'{python}, torch {torch}: {figures}')
        if len(lost) < 2:
            return f'there is no figure of a runtime, only of {", ".join(figures)}'
        return ', '.join(f'{model} loses {100 * value:.1f} points' for model, value in lost.items() if value > LOST)
    finally:
        if not keep:
            shutil.rmtree(venv, ignore_errors=True)


def main() -> int:
    """Tries them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('pythons', nargs='*', metavar='PYTHON', help='default: the oldest and the newest that is here')
    parser.add_argument('--keep', action='store_true', help='leave the environments')
    args = parser.parse_args()
    pythons, failed = args.pythons or ends(), {}
    say(f'Trying {", ".join(pythons) or "nothing: no supported Python is here"}')
    for number, python in enumerate(pythons):
        newest = not args.pythons and number == len(pythons) - 1
        torch = fetched(python, 'torch' if newest else f'torch=={TORCH}')
        if torch is None:
            say(f'{python} is left out: its torch cannot be fetched here, or there is no space for it.')
        elif problem := try_python(python, torch, args.keep):
            failed[python] = problem
    for python, problem in failed.items():
        say(f'{python}: {problem}')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
