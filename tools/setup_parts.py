"""Parts of tools/setup_env.py that know nothing of environments' order; the standard library alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs in a candidate interpreter: what it has, without importing any of it.
PROBE = r"""
import glob, importlib.util, json, os, sys
sys.path = [p for p in sys.path if p not in ('', os.getcwd())]
def folder(name):
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or []) if spec else []
    return places[0] if places else None
found = {n: folder(n) for n in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmdet_ptq')}
found['mmcv._ext'] = bool(found['mmcv'] and glob.glob(os.path.join(found['mmcv'], '_ext*.so')))
dev = [n for n in ('rich', 'jinja2', 'matplotlib', 'pytest', 'pytest_timeout', 'hypothesis', 'ruff')
       if importlib.util.find_spec(n) is None]
sites = sorted({os.path.dirname(v) for v in found.values() if isinstance(v, str)})
print(json.dumps(dict(version=sys.version_info[:3], prefix=sys.prefix, found=found, dev=dev,
                      stamp=[[s, os.stat(s).st_mtime_ns] for s in sites])))
"""


class SetupError(Exception):
    """What stops the set-up, in one sentence that says how to mend it."""


def say(text: str) -> None:
    """Prints one line of progress, marked as ours."""
    print(f'[setup] {text}', flush=True)


def probe(python: str) -> dict | None:
    """Returns what the interpreter has installed, or None when it does not run (as pyenv shims may not)."""
    try:
        done = subprocess.run([python, '-c', PROBE], capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def digest(*parts: object) -> str:
    """Returns a short hash of the parts, the key of a stamp."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def extra(name: str) -> list[str]:
    """Returns the requirements of an extra in pyproject.toml, the one place that pins versions.

    Read with a regular expression: Python 3.10 has no TOML parser.
    """
    text = (ROOT / 'pyproject.toml').read_text()
    body = re.search(rf'^{name} = \[(.*?)\]$', text, re.MULTILINE | re.DOTALL)
    return re.findall(r"'([^']+)'", body.group(1))


def clock(seconds: float) -> str:
    """Returns a duration as `3 min 05 s`."""
    return f'{int(seconds) // 60} min {int(seconds) % 60:02d} s' if seconds >= 60 else f'{int(seconds)} s'


def stop_group(child: subprocess.Popen) -> None:
    """Interrupts a command and all that it started (pip leaves its compilers running), kills what stays."""
    try:
        os.killpg(child.pid, signal.SIGINT)
        for _ in range(50):
            child.poll()
            os.killpg(child.pid, 0)
            time.sleep(0.2)
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:  # the group is empty
        pass
