"""Other processors than the one at hand: a copy of ONNX Runtime that believes to run on one without VNNI.

ONNX Runtime chooses its kernels by the instruction CPUID alone. In the copy each CPUID is a breakpoint, whose handler
answers as the processor would, without the instructions that are to be absent. It runs at full speed, unlike an
emulator. OpenVINO and torch take ``ONEDNN_MAX_CPU_ISA`` from the environment instead.

    python -m mmdet_ptq.testing.processors avx2 python -m pytest
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

# what a processor is asked to be, and what oneDNN calls it
PROCESSORS = {'avx2': 'AVX2', 'avx512': 'AVX512_CORE'}
_CPUID, _BREAKPOINT = b'\x0f\xa2', b'\xcc\x90'
_PACKAGE = 'onnxruntime'
# what the package has and Python does not read
_LEFT_OUT = ('__pycache__', 'libonnxruntime.so*')
_HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

static int has_avx512;

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned leaf = r[REG_RAX], part = r[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7 && part == 0) {
        c &= ~(1u << 11);                        /* AVX512-VNNI */
        d &= ~(1u << 22 | 1u << 24 | 1u << 25);  /* AMX */
        if (!has_avx512)                         /* AVX512 F, DQ, IFMA, CD, BW, VL */
            b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 28 | 1u << 30 | 1u << 31);
    }
    if (leaf == 7 && part == 1) {
        a &= ~(1u << 4 | 1u << 5);               /* AVX-VNNI, AVX512-BF16 */
        d &= ~(1u << 4 | 1u << 10);              /* AVX-VNNI-INT8, AVX-VNNI-INT16 */
    }
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
    r[REG_RIP] += 1;                             /* behind the breakpoint's second byte */
}

__attribute__((constructor)) static void install(void) {
    const char *processor = getenv("MMDET_PTQ_PROCESSOR");
    struct sigaction action;
    has_avx512 = processor != NULL && strcmp(processor, "avx512") == 0;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGTRAP, &action, NULL);
}
"""


def cannot_emulate() -> str:
    """Why no other processor can be emulated here; '' where one can."""
    if platform.machine() not in ('x86_64', 'AMD64') or platform.system() != 'Linux':
        return 'processors without VNNI are emulated on x86 under Linux'
    missing = [name for name in ('gcc', 'objdump') if shutil.which(name) is None]
    if importlib.util.find_spec(_PACKAGE) is None:
        missing.append(_PACKAGE)
    return f'needs {" and ".join(missing)} to emulate a processor without VNNI' if missing else ''


def environment(processor: str, folder: str | os.PathLike | None = None) -> dict[str, str]:
    """The environment in which a Python program finds itself on another processor.

    Args:
        processor: 'avx2' or 'avx512': both without VNNI and AMX.
        folder: Where the copy of ONNX Runtime lies, or is made; one that is there is used again. Defaults to None: a
            folder in the user's cache.
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmdet-ptq' / 'processors'
    place = _copy(cache if folder is None else Path(folder))
    paths = [str(place), *filter(None, [os.environ.get('PYTHONPATH')])]
    return {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(paths),
        'MMDET_PTQ_PROCESSOR': processor,
        'ONEDNN_MAX_CPU_ISA': PROCESSORS[processor],
    }


def _copy(folder: Path) -> Path:
    """The folder with the changed copy of the installed ONNX Runtime."""
    parts = importlib.metadata.version(_PACKAGE), _HANDLER, *_LEFT_OUT
    key = hashlib.sha256(''.join(parts).encode()).hexdigest()[:12]
    place = folder / f'{_PACKAGE}-{key}'
    if place.exists():
        return place
    source = Path(importlib.util.find_spec(_PACKAGE).origin).parent
    unfinished = folder / f'{place.name}.{os.getpid()}'
    package = unfinished / _PACKAGE
    shutil.copytree(source, package, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    for library in package.glob('capi/*.so'):
        content = bytearray(library.read_bytes())
        for place_of_cpuid in _cpuids(library):
            assert content[place_of_cpuid : place_of_cpuid + 2] == _CPUID
            content[place_of_cpuid : place_of_cpuid + 2] = _BREAKPOINT
        # a new file: the copy may be a link to the installed one
        library.unlink()
        library.write_bytes(content)
    handler = package / 'processor.so'
    (package / 'processor.c').write_text(_HANDLER)
    subprocess.run(['gcc', '-O1', '-shared', '-fPIC', '-o', handler, package / 'processor.c'], check=True)
    init = package / '__init__.py'
    # before anything of the package is loaded, whose initializers ask for the processor
    init.write_text(f'import ctypes\nctypes.CDLL({str(place / _PACKAGE / handler.name)!r})\n{init.read_text()}')
    try:
        unfinished.rename(place)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return place


def _cpuids(library: Path) -> list[int]:
    """Offsets in the file of a library's CPUID instructions."""

    def objdump(option: str) -> str:
        return subprocess.run(['objdump', option, library], capture_output=True, text=True, check=True).stdout

    sections = [
        tuple(int(number, 16) for number in match.groups())
        for match in re.finditer(
            r'^\s*\d+ \S+ +([0-9a-f]{8,}) +([0-9a-f]{8,}) +[0-9a-f]{8,} +([0-9a-f]{8,})', objdump('-h'), re.MULTILINE
        )
    ]
    addresses = [
        int(address, 16) for address in re.findall(r'^\s*([0-9a-f]+):\t0f a2 \s*\tcpuid', objdump('-d'), re.MULTILINE)
    ]
    return [
        address - start + offset
        for address in addresses
        for size, start, offset in sections
        if start <= address < start + size
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs a command on another processor; returns its exit code."""
    processor, *command = (sys.argv[1:] if argv is None else argv) or ['']
    if processor not in PROCESSORS or not command:
        print(f'usage: python -m mmdet_ptq.testing.processors {{{",".join(PROCESSORS)}}} COMMAND ...', file=sys.stderr)
        return 2
    if reason := cannot_emulate():
        print(f'error: {reason}', file=sys.stderr)
        return 2
    return subprocess.run(command, env=environment(processor)).returncode


if __name__ == '__main__':
    sys.exit(main())
