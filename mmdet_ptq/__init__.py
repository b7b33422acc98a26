"""mmdet-ptq: post-training quantization for MMDetection."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from mmdet_ptq.errors import PTQError
from mmdet_ptq.startup import is_command
from mmdet_ptq.version import __version__

if TYPE_CHECKING:
    from mmdet_ptq.engine import PTQRunner, load_exported, load_quantized, quantize

__all__ = ['PTQError', 'PTQRunner', '__version__', 'load_exported', 'load_quantized', 'quantize']

# Anything that imports us, a config's scoped type included, gets the faults of the stack mended. Without mmdet the
# package still imports, so that the doctor can say what is missing.
if find_spec('mmdet') and find_spec('mmengine') and not is_command():
    from mmdet_ptq.compat import apply_workarounds

    apply_workarounds()


def __getattr__(name: str) -> object:
    # the engine imports all of mmdet: only on demand
    if name in ('PTQRunner', 'load_exported', 'load_quantized', 'quantize'):
        from mmdet_ptq import engine

        return getattr(engine, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
