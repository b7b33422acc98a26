#!/usr/bin/env python3
"""Makes sure that an environment with the detector stack is there, then runs a command in it.

    python tools/setup_env.py [--dry-run] [COMMAND ...]        COMMAND: arguments of `python`, e.g. -m pytest

An environment that already imports torch, mmengine, mmcv (with its operators) and mmdet is used as it is:
`PYTHON=...`, else the active virtualenv or conda environment, else `python3`. Otherwise `.venv` is made.
Every finished step leaves a stamp, so an interrupted set-up goes on where it stopped. The standard library
is all that it needs. Environment variables: PYTHON, STACK (openmmlab | onedl), TORCH (a version),
VENV (the folder), MAX_JOBS and CFLAGS for the build of mmcv; pip reads its own as always.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from setup_mmcv import Mmcv
from setup_parts import ROOT, SetupError, clock, digest, extra, probe, say, stop_group

TORCH = '2.13.0'
STACKS = ('openmmlab', 'onedl')
BUILD_TOOLS = ['pip', 'setuptools<82', 'wheel', 'ninja', 'psutil', 'packaging']
SUPPORTED = ((3, 10), (3, 11), (3, 12), (3, 13))
STACK_IMPORTS = 'import torch, mmengine, mmcv.ops, mmdet'


# ---- an environment that is already there


def candidates() -> list[str]:
    """Returns the interpreters that may hold the user's own stack, the most explicit first."""
    if os.environ.get('PYTHON'):
        return [os.environ['PYTHON']]
    prefixes = [os.environ[k] for k in ('VIRTUAL_ENV', 'CONDA_PREFIX') if os.environ.get(k)]
    return [f'{prefix}/bin/python' for prefix in prefixes] or ['python3']


def foreign_environment(venv: Path, dry_run: bool) -> str | None:
    """Returns the user's interpreter if its stack imports, and makes our package importable there."""
    for python in candidates():
        info = probe(python)
        if info is None:
            if os.environ.get('PYTHON'):
                raise SetupError(f'PYTHON={python} does not run; give the path of a Python 3.10 to 3.13.')
            continue
        missing = [n for n in ('torch', 'mmengine', 'mmcv', 'mmcv._ext', 'mmdet') if not info['found'][n]]
        if Path(info['prefix']).resolve() == venv.resolve() or len(missing) == 5:
            continue
        if missing:
            say(f'{python} lacks {", ".join(missing)}; it is left alone, and {venv.name} is used.')
            continue
        stamp = ROOT / '.venv' / '.setup' / f'active-{digest(info["stamp"])}'
        if not stamp.exists():
            say(f'Checking the detector stack of {python}')
            tried = subprocess.run([python, '-c', STACK_IMPORTS], capture_output=True, text=True)
            if tried.returncode:
                reason = (tried.stderr.strip().splitlines() or ['it crashed'])[-1]
                say(
                    f'{python} does not import its stack ({reason}); it is left alone, and {venv.name} is '
                    f'used. `{python} tools/doctor.py` says how to mend it.'
                )
                continue
        say(f'Using the environment of {python} (Python {".".join(map(str, info["version"]))}) as it is')
        if complete_foreign(python, info, dry_run):
            info = probe(python) or info
        if not dry_run:
            stamp = stamp.with_name(f'active-{digest(info["stamp"])}')
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
        # the source folder first, whatever version of us that environment may hold
        os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        return python
    return None


def complete_foreign(python: str, info: dict, dry_run: bool) -> bool:
    """Adds our package and missing test tools to the user's environment; never its torch, mmcv or mmdet."""
    ours = info['found']['mmdet_ptq']
    commands = []
    if ours is None:
        commands.append(['--no-deps', '--no-build-isolation', '-e', str(ROOT)])
    elif Path(ours).resolve() != ROOT / 'mmdet_ptq':
        say(f'mmdet_ptq is installed from {Path(ours).parent}; this run uses {ROOT} instead.')
    if info['dev']:
        commands.append([name.replace('_', '-') for name in info['dev']])
    for arguments in commands:
        command = [python, '-m', 'pip', 'install', '--quiet', *arguments]
        say('+ ' + shlex.join(command))
        if not dry_run and subprocess.run(command).returncode:
            # PYTHONPATH still makes the package importable for the command that follows
            say('pip refused; going on without, with the package taken from the source folder.')
    return bool(commands) and not dry_run


# ---- our own environment


class Venv:
    """The environment that the set-up makes: steps with stamps, one log file per step."""

    def __init__(self, path: Path, stack: str, torch: str | None, dry_run: bool) -> None:
        self.path, self.stack, self.torch, self.dry_run = path, stack, torch, dry_run
        self.python = path / 'bin' / 'python'
        self.state = path / '.setup'
        self.lock: int | None = None

    def key(self) -> str:
        """Returns the hash of all that was asked for and of what is there for mmcv to be linked against."""
        built = self.dists('torch', 'mmcv', 'onedl_mmcv', 'mmdet_ptq')
        return digest(self.stack, self.torch, TORCH, BUILD_TOOLS, self.project_files(), built)

    def project_files(self) -> list[str]:
        """Returns all that decides what an installation of our package asks for and where it points."""
        return [str(ROOT), *((ROOT / name).read_text() for name in ('pyproject.toml', 'setup.cfg'))]

    def is_ready(self) -> bool:
        """Tells whether the last set-up finished with the same request."""
        stamp = self.state / 'ready'
        return self.python.exists() and stamp.exists() and stamp.read_text() == self.key() and self.has_wanted_python()

    def has_wanted_python(self) -> bool:
        """Tells whether the environment is of the same Python version as PYTHON, if that is given."""
        wanted = os.environ.get('PYTHON')
        return not wanted or (probe(wanted) or {}).get('version', [])[:2] == self.minor_version()

    def minor_version(self) -> list[int]:
        """Returns [major, minor] of the interpreter in the environment, or []."""
        config = self.path / 'pyvenv.cfg'
        text = config.read_text() if config.exists() else ''
        match = re.search(r'^version\S* = (\d+)\.(\d+)', text, re.MULTILINE)
        return [int(g) for g in match.groups()] if match else []

    def step(self, name: str, inputs: Callable[[], object], action: Callable[[], None]) -> None:
        """Runs one step unless its stamp says that it finished with the same inputs."""
        stamp = self.state / name
        if stamp.exists() and stamp.read_text() == digest(inputs()):
            return
        start = time.monotonic()
        if not self.dry_run:
            stamp.unlink(missing_ok=True)
        action()
        if not self.dry_run:
            stamp.write_text(digest(inputs()))  # what is installed is an input too, and has just changed
            say(f'{name}: done in {clock(time.monotonic() - start)}')

    def run(
        self,
        what: str,
        command: Sequence[str | Path],
        log_name: str,
        *,
        env: dict[str, str] | None = None,
        progress: Callable[[], str] | None = None,
    ) -> None:
        """Runs a command into a log file and shows that it is alive.

        Raises:
            SetupError: when it fails, after the end of its log was shown.
        """
        command = list(map(str, command))
        say(
            f'{what}\n        + {" ".join(f"{k}={shlex.quote(v)}" for k, v in (env or {}).items())}'
            f'{" " if env else ""}{shlex.join(command)}'
        )
        if self.dry_run:
            return
        log, start, told = self.state / f'{log_name}.log', time.monotonic(), time.monotonic()
        with log.open('wb') as out:
            # the lock goes along: a child that outlives us must keep a second set-up away from the folder
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdout=out,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self.lock],
            )
            try:
                while child.poll() is None:
                    time.sleep(0.2)
                    line = f'{progress() if progress else "at work"}, {clock(time.monotonic() - start)}'
                    if sys.stdout.isatty():
                        print(f'\r\033[K        {line}', end='', flush=True)
                    elif time.monotonic() - told >= 20:
                        told = time.monotonic()
                        print(f'        {line}', flush=True)
            except KeyboardInterrupt:
                stop_group(child)
                raise
            finally:
                if sys.stdout.isatty():
                    print('\r\033[K', end='', flush=True)
        if child.returncode:
            print('\n'.join(log.read_text(errors='replace').splitlines()[-30:]), flush=True)
            raise SetupError(f'"{what}" failed; the whole log is {log}.')

    def pip(self, name: str, *arguments: str | Path) -> None:
        """Installs with pip."""
        # Python compiles what is imported; compiling all of torch and its like beforehand takes half a minute
        command = [self.python, '-m', 'pip', 'install', '--disable-pip-version-check', '--no-compile', *arguments]
        self.run(f'Installing {name}', command, name.split()[-1])

    def imports(self, statement: str) -> str:
        """Returns '' if the statement runs in the environment, else the last line of its error."""
        done = subprocess.run([self.python, '-c', statement], capture_output=True, text=True)
        return '' if done.returncode == 0 else (done.stderr.strip().splitlines() or ['it crashed'])[-1]

    def dists(self, *names: str) -> list[str]:
        """Returns the installed distributions (`torch-2.13.0`) of the given names."""
        found = [p.name.removesuffix('.dist-info') for p in self.path.glob('lib/python*/site-packages/*.dist-info')]
        return sorted(d for d in found if d.split('-')[0] in names)

    # ---- the steps

    def make(self) -> None:
        """Runs all the steps that are not done yet."""
        pins = {re.split('[=<]', p)[0]: p for p in extra(self.stack)}
        mmcv = next(p for p in pins.values() if 'mmcv' in p)
        before = [p for n, p in pins.items() if n.endswith('mmengine')]
        after = [p for n, p in pins.items() if 'mmdet' in n]
        self.step('venv', lambda: self.python.exists(), self.make_venv)
        self.step('tools', lambda: BUILD_TOOLS, lambda: self.pip('the build tools', '--upgrade', *BUILD_TOOLS))
        self.step('torch', lambda: [self.torch, self.dists('torch')], self.install_torch)
        self.step(
            'mmengine',
            lambda: [before, self.dists('mmengine', 'onedl_mmengine')],
            lambda: self.pip('mmengine', *before),
        )
        built = Mmcv(self, mmcv)
        self.step('mmcv', lambda: [mmcv, self.dists('torch', 'mmcv', 'onedl_mmcv')], built.install)
        self.step('opencv', lambda: self.dists('opencv_python', 'opencv_python_headless'), self.mend_opencv)
        self.step('operators', lambda: self.dists('torch', 'mmcv', 'onedl_mmcv'), built.check_operators)
        self.step(
            'mmdet',
            lambda: [after, self.dists('mmdet', 'onedl_mmdetection')],
            lambda: self.pip('mmdet', '--no-build-isolation', *after),
        )
        self.step(
            'mmdet-ptq',
            lambda: [self.project_files(), self.dists('mmdet_ptq')],
            lambda: self.pip('mmdet-ptq', '--no-build-isolation', '-e', f'{ROOT}[dev]'),
        )
        if self.dry_run:
            return
        if error := self.imports(STACK_IMPORTS + ', mmdet_ptq'):
            raise SetupError(
                f'The environment was made but does not work ({error}); '
                f'`{self.python} tools/doctor.py` says what is wrong.'
            )
        (self.state / 'ready').write_text(self.key())

    def make_venv(self) -> None:
        """Makes an empty environment, of a Python that works."""
        names = (
            [os.environ['PYTHON']]
            if os.environ.get('PYTHON')
            else [sys.executable, 'python3.11', 'python3.12', 'python3.10', 'python3.13', 'python3']
        )
        base = next((n for n in names if tuple((probe(n) or {}).get('version', ())[:2]) in SUPPORTED), None)
        if base is None:
            raise SetupError(
                f'None of {", ".join(names)} is a working Python 3.10 to 3.13; install one, or '
                'name it with PYTHON=/path/to/python.'
            )
        modules = [base, '-c', 'import ensurepip, venv']
        if subprocess.run(modules, capture_output=True).returncode:
            raise SetupError(
                f'{base} cannot make virtual environments; install its venv module '
                '(Debian, Ubuntu: apt install python3-venv).'
            )
        self.check_compiler(base)
        self.run(f'Making {self.path.name}', [base, '-m', 'venv', self.path], 'venv')
        if not self.dry_run:
            (self.path / '.gitignore').write_text('*\n')

    def check_compiler(self, base: str) -> None:
        """Raises a SetupError now rather than after minutes of downloads if mmcv could not be compiled."""
        compilers = [os.environ.get('CC', 'gcc'), os.environ.get('CXX', 'g++')]
        absent = [c for c in compilers if shutil.which(shlex.split(c)[0]) is None]
        if absent:
            raise SetupError(
                f'mmcv is compiled here and {" and ".join(absent)} cannot be found; install a '
                'C++ compiler (Debian, Ubuntu: apt install build-essential).'
            )
        ask = 'import sysconfig; print(sysconfig.get_path("include"))'
        include = subprocess.run([base, '-c', ask], capture_output=True, text=True).stdout.strip()
        if not Path(include, 'Python.h').exists():
            raise SetupError(
                f'mmcv is compiled here and the headers of {base} cannot be found; install them '
                '(Debian, Ubuntu: apt install python3-dev).'
            )

    def install_torch(self) -> None:
        """Installs torch, unless the environment has one and none was asked for."""
        if self.torch is None and self.dists('torch') and not self.imports('import torch'):
            say(f'Keeping {self.dists("torch")[0]}')
            return
        self.pip('torch', f'torch=={self.wanted_torch()}')

    def wanted_torch(self) -> str:
        """Returns the version of torch that is installed where there is none."""
        return self.torch or TORCH

    def mend_opencv(self) -> None:
        """Swaps opencv for its headless build where the display libraries that it links are absent."""
        if self.dry_run:
            return say('opencv-python is replaced by opencv-python-headless if `import cv2` fails')
        error = self.imports('import cv2')
        if not error:
            return
        say(f'opencv-python does not load ({error}); taking its headless build')
        self.run(
            'Removing opencv-python', [self.python, '-m', 'pip', 'uninstall', '-y', 'opencv-python'], 'opencv-python'
        )
        self.pip('opencv-python-headless', '--force-reinstall', '--no-deps', 'opencv-python-headless')
        if error := self.imports('import cv2'):
            raise SetupError(f'cv2 does not import ({error}).')


def own_environment(venv: Venv) -> str:
    """Returns the interpreter of our own environment, made or completed first where needed."""
    if not venv.is_ready():
        if not venv.dry_run:
            venv.state.mkdir(parents=True, exist_ok=True)
        venv.lock = os.open(ROOT, os.O_RDONLY)  # a lock on the folder itself leaves no lock file behind
        try:
            fcntl.flock(venv.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say('Another set-up is at work in this folder; waiting for it')
            fcntl.flock(venv.lock, fcntl.LOCK_EX)
            if venv.is_ready():
                return str(venv.python)
        if venv.minor_version() and not venv.has_wanted_python():
            say(f'{venv.path.name} has another Python than PYTHON; it is made anew.')
            if not venv.dry_run:
                shutil.rmtree(venv.path)
                venv.state.mkdir(parents=True)
        start = time.monotonic()
        say(f'Setting up {venv.path}, stack {venv.stack}; after Ctrl-C a repeat goes on where it stopped')
        venv.make()
        if not venv.dry_run:
            say(f'The environment is ready ({clock(time.monotonic() - start)})')
    return str(venv.python)


def main() -> int:
    """Sets up, then becomes the command."""
    command = sys.argv[1:]  # not argparse: everything after our one option belongs to `python`
    if command[:1] in (['-h'], ['--help']):
        print(__doc__)
        return 0
    dry_run = command[:1] == ['--dry-run']
    command = command[dry_run:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        stack = os.environ.get('STACK') or STACKS[0]
        if stack not in STACKS:
            raise SetupError(f'STACK={stack} is not known; it is one of {", ".join(STACKS)}.')
        folder = os.environ.get('VENV') or ('.venv' if stack == STACKS[0] else f'.venv-{stack}')
        venv = Venv(ROOT / folder, stack, os.environ.get('TORCH') or None, dry_run)
        python = foreign_environment(venv.path, dry_run) or own_environment(venv)
    except SetupError as error:
        say(f'Error: {error}')
        return 1
    except KeyboardInterrupt:
        say('Interrupted; repeat the same command to go on where it stopped.')
        return 130
    if dry_run or not command:
        return 0
    say('+ ' + shlex.join([python, *command]))
    os.execvp(python, [python, *command])


if __name__ == '__main__':
    sys.exit(main())
