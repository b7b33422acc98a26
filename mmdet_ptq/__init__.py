"""mmdet-ptq: post-training quantization for MMDetection."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING

from mmdet_ptq.errors import PTQError
from mmdet_ptq.startup import ends_at_once
from mmdet_ptq.version import __version__

if TYPE_CHECKING:
    from mmdet_ptq.engine import PTQRunner, load_exported, load_quantized, quantize

__all__ = ['PTQError', 'PTQRunner', '__version__', 'load_exported', 'load_quantized', 'quantize']

# programs that end in mmdet_ptq.cli, installed and in a clone
_COMMANDS = ('mmdet-ptq', 'mmdet-ptq-analyze', 'mmdet-ptq-export', 'mmdet-ptq-test')
_TOOLS = ('analyze', 'export', 'ptq', 'test')


def _is_command() -> bool:
    """Whether a command line of ours imports the package, which mends when it begins to work."""
    path, tools = Path(sys.argv[0] if sys.argv else '').absolute(), Path(__file__).absolute().parents[1] / 'tools'
    ours = path.stem in _COMMANDS or (path.parent == tools and path.stem in _TOOLS)
    # a process that a command spawns, as data loaders do, has its name and never comes by the command line
    return ours and parent_process() is None


# Anything that imports us, a config's scoped type included, gets the faults of the stack mended. Without mmdet the
# package still imports, so that the doctor can say what is missing.
if find_spec('mmdet') and find_spec('mmengine') and not _is_command():
    with ends_at_once():
        from mmdet_ptq.compat import apply_workarounds

        apply_workarounds()


def __getattr__(name: str) -> object:
    # the engine imports all of mmdet: only on demand
    if name in ('PTQRunner', 'load_exported', 'load_quantized', 'quantize'):
        from mmdet_ptq import engine

        return getattr(engine, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
