"""OpenVINO itself, and how our models stand in it: what they say about themselves, and their layers."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

META = 'mmdet_ptq'
# what is not quantized stays exact: the default takes bfloat16 where the processor has it
FLOAT32 = {'INFERENCE_PRECISION_HINT': 'f32'}
TRANSPOSED = ('ConvolutionBackpropData', 'GroupConvolutionBackpropData')
_OPERATIONS = ('Convolution', 'GroupConvolution', *TRANSPOSED, 'MatMul')


@functools.cache
def shared_core() -> openvino.Core:
    """The one core of the process, which is never given back.

    OpenVINO's plugin for CPUs gives the thread that loads it a stack for signals (2026.4 does). Two plugins that go in
    the order in which they came leave one behind whose memory is gone: the next signal, as of a worker of a data loader
    that ends, ends the process.
    """
    import openvino

    core = openvino.Core()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(core))
    return core


def layer_operations(model, calls: Collection[str]) -> dict:
    """Name of each call of a layer to its operation in a model.

    Args:
        model: What ``openvino.Core().read_model`` returns.
        calls: Names of the layers' calls.
    """
    found = {}
    for op in model.get_ordered_ops():
        # a folded convolution is called NAME/WithoutBiases
        name = op.get_friendly_name().partition('/')[0]
        if name in calls and op.get_type_name() in _OPERATIONS:
            found.setdefault(name, op)
    return found
