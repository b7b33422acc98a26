"""mmdet-ptq: post-training quantization for MMDetection."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mmdet_ptq.errors import PTQError
from mmdet_ptq.version import __version__

if TYPE_CHECKING:
    from mmdet_ptq.engine import PTQRunner, load_quantized, quantize

__all__ = ['PTQError', 'PTQRunner', '__version__', 'load_quantized', 'quantize']

# our command lines, by the names of their files
_COMMANDS = {'ptq.py', 'analyze.py', 'export.py', 'test.py'}
_COMMANDS |= {'mmdet-ptq', 'mmdet-ptq-analyze', 'mmdet-ptq-export', 'mmdet-ptq-test'}

# Anything that imports us, a config's scoped type included, gets the faults of the stack mended. Without mmdet the
# package still imports, so that the doctor can say what is missing.
if find_spec('mmdet') and find_spec('mmengine'):
    try:
        from mmdet_ptq.compat import apply_workarounds

        apply_workarounds()
    except KeyboardInterrupt:
        # it takes seconds, and a command line of ours is not yet there to tell
        if Path(sys.argv[0]).name not in _COMMANDS:
            raise
        print('\ninterrupted; nothing was begun, run the same command again.', file=sys.stderr)
        sys.exit(130)


def __getattr__(name: str) -> object:
    # the engine imports all of mmdet: only on demand
    if name in ('PTQRunner', 'load_quantized', 'quantize'):
        from mmdet_ptq import engine

        return getattr(engine, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
