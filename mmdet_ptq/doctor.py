"""What is installed, what is wrong with it, and how to mend it.

Everything is looked up by import name, never by distribution name: the original OpenMMLab packages and the
maintained fork (`onedl-*`) install the same modules. This file imports none of ours, so that it runs alone
where the stack, and with it the package, does not import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

OK, NOTE, PROBLEM = 'ok', 'note', 'problem'
_SUPPORTED = ((3, 10), (3, 14))
_INSTALL = {
    'torch': '`pip install torch`',
    'mmengine': '`pip install mmengine==0.10.7`',
    'mmcv': ('`MMCV_WITH_OPS=1 pip install --no-build-isolation mmcv==2.1.0`, after torch and `setuptools<82`'),
    'mmdet': '`pip install mmdet==3.3.0`',
}


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Args:
        name: What was looked at.
        found: Its version, or what happened on import.
        status: ``'ok'``, ``'note'`` (works, but worth knowing) or ``'problem'``.
        advice: One sentence that says how to mend it; empty when there is nothing to mend.
    """

    name: str
    found: str
    status: str = OK
    advice: str = ''


def examine() -> list[Finding]:
    """Examines the environment; never raises, whatever is missing or broken."""
    checks: list[Callable[[], list[Finding]]] = [
        processor_findings,
        _python,
        _torch,
        _numpy,
        setuptools_findings,
        _opencv,
        _mmengine,
        _mmcv,
        mmdet_findings,
        _pycocotools,
        _report,
        runtime_findings,
    ]
    return [finding for check in checks for finding in check()]


def format_table(findings: list[Finding]) -> str:
    """Returns the findings as an aligned table, the advice below it."""
    marks = {OK: 'ok', NOTE: 'note', PROBLEM: 'PROBLEM'}
    width = max(len(f.name) for f in findings)
    lines = [f'{marks[f.status]:8}{f.name:{width}}  {f.found}' for f in findings]
    advice = [f'{marks[f.status]:8}{f.name}: {f.advice}' for f in findings if f.advice]
    problems = sum(f.status == PROBLEM for f in findings)
    summary = f'{problems} problem{"s" * (problems > 1)} found.' if problems else 'No problem found.'
    return '\n'.join([*lines, '', *advice, *([''] if advice else []), summary])


def main() -> int:
    """Prints the table; returns 1 if there is a problem, else 0."""
    findings = examine()
    print(format_table(findings))
    return int(any(f.status == PROBLEM for f in findings))


def _import(name: str) -> tuple[ModuleType | None, str]:
    """Returns the module and '', or None and the reason; '' as the reason means that it is absent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return importlib.import_module(name), ''
    except ModuleNotFoundError as error:
        absent = error.name == name.partition('.')[0]
        return None, '' if absent else f'{type(error).__name__}: {_first_line(error)}'
    except Exception as error:  # a broken package may raise anything, mmdet raises AssertionError
        return None, f'{type(error).__name__}: {_first_line(error)}'


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ['no message'])[0][:160]


def _version(module: ModuleType) -> str:
    return str(getattr(module, '__version__', 'unknown version'))


def _distributions(module: str) -> list[str]:
    """Returns the names of the installed distributions that provide a top-level module."""
    return sorted(set(importlib.metadata.packages_distributions().get(module, [])))


def _missing(name: str, reason: str, advice: str) -> list[Finding]:
    return [Finding(name, reason or 'absent', PROBLEM, advice)]


def processor() -> tuple[str, list[str] | None]:
    """The processor's name, and which instructions for int8 it has; None where the system does not tell them."""
    listing = Path('/proc/cpuinfo')
    text = listing.read_text(errors='replace') if listing.is_file() else ''
    told = {key: re.search(rf'^{key}\s*:\s*(.*)$', text, re.MULTILINE) for key in ('model name', 'flags', 'Features')}
    name = told['model name'].group(1) if told['model name'] else platform.processor() or platform.machine()
    flags = next((told[key].group(1).split() for key in ('flags', 'Features') if told[key]), None)
    names = {
        'avx512_vnni': 'AVX512-VNNI',
        'avx_vnni': 'AVX-VNNI',
        'amx_int8': 'AMX',
        'asimddp': 'dot product',
        'i8mm': 'I8MM',
    }
    return name, None if flags is None else [shown for flag, shown in names.items() if flag in flags]


def processor_findings() -> list[Finding]:
    name, integers = processor()
    wide = platform.machine() in ('x86_64', 'AMD64')
    if integers or not wide or integers is None:
        return [Finding('processor', f'{name}, {", ".join(integers or [platform.machine()])}')]
    return [
        Finding(
            'processor',
            f'{name}, without VNNI',
            NOTE,
            "Exported models compute the same as elsewhere (unless `ptq.saturation='ignore'`), but int8 is "
            'hardly faster than float here; measure on the processor that you ship to.',
        )
    ]


def _python() -> list[Finding]:
    found = f'{platform.python_version()} ({sys.executable})'
    if _SUPPORTED[0] <= sys.version_info[:2] <= _SUPPORTED[1]:
        return [Finding('python', found)]
    old = sys.version_info[:2] < _SUPPORTED[0]
    return [
        Finding(
            'python',
            found,
            PROBLEM if old else NOTE,
            'mmdet-ptq is tested with Python 3.10 to 3.14; install Python 3.12 and make an environment with it.',
        )
    ]


def _torch() -> list[Finding]:
    torch, reason = _import('torch')
    if torch is None:
        return _missing('torch', reason, f'Install torch first, mmcv is compiled against it: {_INSTALL["torch"]}.')
    rows = [Finding('torch', _version(torch))]
    if torch.cuda.is_available():
        return [*rows, Finding('CUDA', f'{torch.version.cuda}, {torch.cuda.get_device_name(0)}')]
    if torch.version.cuda:
        return [
            *rows,
            Finding(
                'CUDA',
                f'{torch.version.cuda}, no device',
                NOTE,
                'torch was built for CUDA but sees no device; everything runs on the CPU.',
            ),
        ]
    return [*rows, Finding('CUDA', 'a CPU build of torch')]


def _numpy() -> list[Finding]:
    numpy, reason = _import('numpy')
    return [Finding('numpy', _version(numpy))] if numpy else _missing('numpy', reason, '`pip install numpy`.')


def setuptools_findings() -> list[Finding]:
    setuptools, _ = _import('setuptools')
    found = _version(setuptools) if setuptools else 'absent'
    if _import('pkg_resources')[0]:
        return [Finding('setuptools', f'{found}, with pkg_resources')]
    if 'mmengine' in _distributions('mmengine'):
        return [
            Finding(
                'setuptools',
                f'{found}, without pkg_resources',
                PROBLEM,
                "mmengine resolves `_base_ = 'mmdet::...'` with pkg_resources, which setuptools 82 "
                "removed: `pip install 'setuptools<82'`.",
            )
        ]
    return [Finding('setuptools', f'{found}, without pkg_resources')]


def _opencv() -> list[Finding]:
    cv2, reason = _import('cv2')
    if cv2:
        return [Finding('opencv', _version(cv2))]
    if any(library in reason for library in ('libGL', 'libgthread', 'libglib')):
        return _missing(
            'opencv',
            reason,
            'The display libraries that opencv-python links are absent; take '
            'the build without them: `pip uninstall -y opencv-python && pip install '
            '--force-reinstall opencv-python-headless`.',
        )
    return _missing('opencv', reason, '`pip install opencv-python-headless`.')


def _mmengine() -> list[Finding]:
    mmengine, reason = _import('mmengine')
    if mmengine is None:
        return _missing('mmengine', reason, f'{_INSTALL["mmengine"]}, or `make setup` for the whole stack.')
    return [Finding('mmengine', f'{_version(mmengine)}{_origin("mmengine")}')]


def _mmcv() -> list[Finding]:
    mmcv, reason = _import('mmcv')
    if mmcv is None:
        return _missing('mmcv', reason, f'{_INSTALL["mmcv"]}, or `make setup` for the whole stack.')
    row = Finding('mmcv', f'{_version(mmcv)}{_origin("mmcv")}')
    ops, reason = _import('mmcv.ops')
    if ops is None and 'No module' in reason:
        return [
            row,
            Finding(
                'mmcv.ops',
                reason,
                PROBLEM,
                'mmdet needs the compiled operators, which '
                'mmcv-lite and an mmcv built without torch lack: build mmcv again, '
                f'{_rebuild()}.',
            ),
        ]
    if ops is None:
        return [
            row,
            Finding(
                'mmcv.ops',
                reason,
                PROBLEM,
                'The operators do not load, as a rule because they '
                f'were compiled against another torch: build mmcv again, {_rebuild()}.',
            ),
        ]
    return [row, _operators(ops)]


def _rebuild() -> str:
    """Returns the command that compiles the installed mmcv anew."""
    name = next((d for d in _distributions('mmcv') if d != 'mmcv-lite'), '')
    pin = f'{name}=={importlib.metadata.version(name)}' if name else 'mmcv==2.1.0'
    return (
        '`MMCV_WITH_OPS=1 pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation '
        f'{pin}` (it needs `setuptools<82` and a C++ compiler)'
    )


def _operators(ops: ModuleType) -> Finding:
    """Runs NMS once: operators of another torch may load and fail only when they are called."""
    import torch

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]], device=device)
    try:
        kept = ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)[1].tolist()
    except Exception as error:  # whatever a compiled operator raises
        return Finding(
            'mmcv.ops',
            f'NMS fails on {device} ({_first_line(error)})',
            PROBLEM,
            f'Build mmcv again against this torch{" with CUDA_HOME set" * (device == "cuda")}, {_rebuild()}.',
        )
    if kept != [0, 2]:
        return Finding(
            'mmcv.ops',
            f'NMS keeps boxes {kept} instead of [0, 2]',
            PROBLEM,
            f'Build mmcv again against this torch, {_rebuild()}.',
        )
    return Finding('mmcv.ops', f'NMS works on {device}')


def mmdet_findings() -> list[Finding]:
    mmdet, reason = _import('mmdet')
    if mmdet is None:
        advice = f'{_INSTALL["mmdet"]}, or `make setup` for the whole stack.'
        if 'MMCV==' in reason or 'MMEngine==' in reason:
            advice = (
                'The versions do not fit: mmdet 3.3.0 goes with mmcv 2.1.0 and mmengine 0.10.7, '
                'onedl-mmdetection 3.5.1 with onedl-mmcv 2.3.6 and onedl-mmengine 0.10.12.'
            )
        elif reason:
            advice = 'mmdet is there but does not import: mend the rows above first, then run this again.'
        return _missing('mmdet', reason, advice)
    row = Finding('mmdet', f'{_version(mmdet)}{_origin("mmdet")}')
    families = {name: {d.startswith('onedl') for d in _distributions(name)} for name in ('mmengine', 'mmcv', 'mmdet')}
    if any(len(family) > 1 for family in families.values()):
        both = ', '.join(name for name, family in families.items() if len(family) > 1)
        return [
            row,
            Finding(
                'stack',
                f'two distributions provide {both}',
                PROBLEM,
                'The files of one overwrite those of the other: uninstall both, then install one of them again.',
            ),
        ]
    if len(set().union(*families.values())) > 1:
        return [
            row,
            Finding(
                'stack',
                'original and onedl packages mixed',
                NOTE,
                'It may work; where it does not, take all three from one family.',
            ),
        ]
    return [row]


def _origin(module: str) -> str:
    names = _distributions(module)
    return f' (from {", ".join(names)})' if names else ''


def _pycocotools() -> list[Finding]:
    module, reason = _import('pycocotools.mask')
    if module:
        return [Finding('pycocotools', importlib.metadata.version('pycocotools'))]
    return _missing(
        'pycocotools',
        reason,
        '`pip install --force-reinstall --no-cache-dir pycocotools` (its '
        'compiled part must fit the numpy that is installed).',
    )


def _report() -> list[Finding]:
    absent = [name for name in ('rich', 'jinja2', 'matplotlib') if _import(name)[0] is None]
    if absent:
        return [
            Finding(
                'report',
                f'{", ".join(absent)} absent',
                PROBLEM,
                f'The table and the report need them: `pip install {" ".join(absent)}`.',
            )
        ]
    return [Finding('report', 'rich, jinja2 and matplotlib present')]


def runtime_findings() -> list[Finding]:
    """Runtimes are optional: the stage `export` needs the one that it is asked for."""
    rows = []
    # their folders tell their names where not even mmengine is installed
    for name in sorted(path.parent.name for path in Path(__file__).parent.glob('deploy/*/runtime.py')):
        module, reason = _import(name)
        if module:
            rows.append(Finding(name, _version(module)))
        elif reason:
            rows.append(
                Finding(name, reason, NOTE, f'{name} is installed but does not import; only exporting to it needs it.')
            )
        else:
            rows.append(Finding(name, 'absent (optional)'))
    return rows


if __name__ == '__main__':
    sys.exit(main())
