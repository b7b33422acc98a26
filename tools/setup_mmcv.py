"""Compiles mmcv against the installed torch, as few translation units; the standard library alone.

Most of the time of the plain build goes into reading torch's headers, once for every one of 77 small files. Files that
include those files take their place. Where one of them does not compile, the plain build is the way out.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from setup_parts import SetupError, say

if TYPE_CHECKING:
    from setup_env import Venv

# these define helpers and macros of the same names as others
ALONE = ('psamask', 'roi_align', 'roi_align_rotated', 'rotated_feature_align')
BINDINGS = 'pybind'
# what the files become that choose between CPU and GPU: one unit for each of two cores
DISPATCH_UNITS = 2
# by the name of the sources that were merged, which `setup.py` must not find
MERGED = '.cpp.part'


# mmcv's `setup.py` reads by `locals()` what `exec` has set, which from Python 3.13 on is kept apart (PEP 667); Python
# imports a module of this name when it starts, that of `setup.py` included
LOCALS_OF_EXEC = """\
import builtins
import sys

plain = builtins.exec


def exec(code, globals=None, locals=None, /, **options):
    if globals is None:
        frame = sys._getframe(1)
        globals, locals = frame.f_globals, frame.f_locals
    plain(code, globals, locals, **options)


builtins.exec = exec
"""


def merge_sources(pytorch: Path) -> None:
    """Replaces C++ sources by a few units that include them; nothing in a source is changed.

    Args:
        pytorch: The folder `mmcv/ops/csrc/pytorch` of an unpacked source archive, all of whose `*.cpp` files, and of
            whose folder `cpu`, are compiled by mmcv's `setup.py`.
    """
    dispatch = [path for path in sorted(pytorch.glob('*.cpp')) if path.stem != BINDINGS]
    for number in range(DISPATCH_UNITS):
        _unit(pytorch / f'unit_{number}.cpp', dispatch[number::DISPATCH_UNITS])
    _unit(pytorch / 'cpu' / 'unit.cpp', [p for p in sorted((pytorch / 'cpu').glob('*.cpp')) if p.stem not in ALONE])


def _unit(path: Path, sources: list[Path]) -> None:
    # in the same folder: what the sources include is found as before
    parts = [source.rename(source.with_suffix(MERGED)) for source in sources]
    path.write_text(''.join(f'#include "{part.name}"\n' for part in parts))


def let_torch_choose_standard(setup: Path) -> None:
    """Drops the C++ standard from mmcv's `setup.py`: torch adds the one of its headers, which is C++20 since 2.14."""
    setup.write_text(re.sub(r"(, )?'-std=c\+\+\d+'", '', setup.read_text(encoding='utf-8')), encoding='utf-8')


class Mmcv:
    """The steps of the set-up that build and install mmcv.

    Args:
        venv: The environment.
        pin: The requirement, `mmcv==VERSION`.
    """

    def __init__(self, venv: Venv, pin: str) -> None:
        self.venv, self.pin = venv, pin
        self.source = venv.state / 'mmcv-source'
        # there after a build as few units that was of no use: the next one is plain
        self.plain = venv.state / 'mmcv-plain'

    def wheel_cache(self) -> Path:
        """Returns the folder for wheels: one per torch, which an mmcv is built against."""
        torch = (self.venv.dists('torch') or [f'torch-{self.venv.wanted_torch()}'])[0]
        return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmdet-ptq' / torch

    def wheel_pattern(self) -> str:
        """Returns what the name of a wheel of this version, Python and platform matches."""
        python = 'cp' + ''.join(map(str, self.venv.minor_version()))
        platform = sysconfig.get_platform().replace('-', '_').replace('.', '_')
        return f'*mmcv-{self.pin.split("==")[1]}-{python}-{python}-{platform}.whl'

    def install(self) -> None:
        """Builds mmcv, or takes the wheel of an earlier build for the same torch, Python and platform."""
        wheels = list(self.wheel_cache().glob(self.wheel_pattern()))
        if wheels:
            say(f'mmcv was compiled here before, against the same torch: {wheels[0]}')
        else:
            self.build()
            # none in a dry run
            wheels = list(self.wheel_cache().glob(self.wheel_pattern())) or [self.wheel_cache() / self.wheel_pattern()]
        self.venv.pip('mmcv', '--force-reinstall', '--no-deps', wheels[0])
        self.venv.pip('the dependencies of mmcv', wheels[0])

    def check_operators(self) -> None:
        """Raises a SetupError, and forgets the wheel, if mmcv was built without working operators."""
        if not self.venv.dry_run and (error := self.venv.imports('import mmcv.ops')):
            for wheel in self.wheel_cache().glob(self.wheel_pattern()):
                wheel.unlink()
            (self.venv.state / 'mmcv').unlink(missing_ok=True)
            self.plain.touch()
            raise SetupError(
                f'mmcv was built without working operators ({error}); repeat the command to '
                f'build it again, file by file; the log of the build is {self.venv.state / "mmcv-build.log"}.'
            )

    def environment(self) -> dict[str, str]:
        """Returns what mmcv's `setup.py` needs in the environment to run at all."""
        if self.venv.minor_version() < [3, 13] or self.venv.dry_run:
            return {}
        startup = self.source / 'startup'
        startup.mkdir(parents=True, exist_ok=True)
        (startup / 'sitecustomize.py').write_text(LOCALS_OF_EXEC)
        return {'PYTHONPATH': os.pathsep.join(filter(None, [str(startup), os.environ.get('PYTHONPATH')]))}

    def build(self) -> None:
        """Compiles in a folder that is kept, so that ninja goes on where an interrupted build stopped."""
        if not any(self.source.glob('*.tar.gz')):
            download = 'pip download --no-deps --no-build-isolation --no-binary :all: -d'.split()
            command = [self.venv.python, '-m', *download, self.source, self.pin]
            self.venv.run('Fetching the source of mmcv', command, 'mmcv-source', env=self.environment())
        say('mmcv publishes no wheel for this torch: it is compiled now, once (1 to 3 minutes on 2 cores).')
        if not self.plain.exists():
            try:
                self.compile('few', merge=True)
            except SetupError as error:
                say(f'{error} It is compiled file by file instead (7 to 15 minutes on 2 cores).')
                self.plain.touch()
        if self.plain.exists():
            self.compile('plain', merge=False)
        if not self.venv.dry_run:
            cache = self.wheel_cache()
            cache.mkdir(parents=True, exist_ok=True)
            for wheel in (self.source / 'wheel').glob('*.whl'):
                shutil.move(wheel, cache / wheel.name)
            shutil.rmtree(self.source)

    def unpack(self, tree: Path, merge: bool) -> None:
        """Unpacks the source archive; the tree is there only when it is complete."""
        unpacking = self.source / 'unpacking'
        shutil.rmtree(unpacking, ignore_errors=True)
        with tarfile.open(next(self.source.glob('*.tar.gz'))) as archive:
            archive.extractall(unpacking)
        (unpacked,) = unpacking.iterdir()
        if merge:
            merge_sources(unpacked / 'mmcv' / 'ops' / 'csrc' / 'pytorch')
        unpacked.rename(tree)

    def compile(self, name: str, merge: bool) -> None:
        """Builds the wheel.

        Args:
            name: Name of the folder it is built in.
            merge: Whether as few units.

        Raises:
            SetupError: when it fails.
        """
        tree = self.source / name
        if not tree.exists() and not self.venv.dry_run:
            self.unpack(tree, merge)
        if not self.venv.dry_run:
            let_torch_choose_standard(tree / 'setup.py')  # of a build that an earlier version began, too
        env = self.environment() | {
            'MMCV_WITH_OPS': '1',
            'MAX_JOBS': os.environ.get('MAX_JOBS') or str(len(os.sched_getaffinity(0))),
            # operators are a small share of a detector's time; -O1 without symbols halves the build
            'CFLAGS': os.environ.get('CFLAGS', '-O1 -g0'),
        }
        gpu = not self.venv.dry_run and not self.venv.imports('import torch; assert torch.cuda.is_available()')
        if gpu and shutil.which('nvcc') is None and 'CUDA_HOME' not in os.environ:
            say(
                'A GPU is there but no nvcc: mmcv gets CPU operators only, so NMS on the GPU will not work. '
                'Install the CUDA toolkit of your torch and remove .venv to have both.'
            )
            env |= {'FORCE_CUDA': '0', 'CUDA_VISIBLE_DEVICES': ''}
            gpu = False
        csrc = tree / 'mmcv' / 'ops' / 'csrc' / 'pytorch'
        patterns = ['*.cpp', 'cpu/*.cpp'] + (['cuda/*.cu', 'cuda/*.cpp'] if gpu else [])
        total = sum(len(list(csrc.glob(p))) for p in patterns)

        def progress() -> str:
            return f'{sum(1 for _ in tree.glob("build/temp*/**/*.o"))} of {total} files compiled'

        wheel = 'pip wheel --verbose --no-deps --no-build-isolation -w'.split()
        self.venv.run(
            'Compiling mmcv',
            [self.venv.python, '-m', *wheel, self.source / 'wheel', tree],
            'mmcv-build',
            env=env,
            progress=progress,
        )
