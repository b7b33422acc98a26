"""How our models stand in OpenVINO: what they say about themselves, and their layers."""

from __future__ import annotations

from collections.abc import Collection

META = 'mmdet_ptq'
# what is not quantized stays exact: the default takes bfloat16 where the processor has it
FLOAT32 = {'INFERENCE_PRECISION_HINT': 'f32'}
_OPERATIONS = ('Convolution', 'GroupConvolution', 'ConvolutionBackpropData', 'GroupConvolutionBackpropData', 'MatMul')


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
