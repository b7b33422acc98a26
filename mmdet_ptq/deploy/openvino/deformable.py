"""ONNX's DeformConv as OpenVINO's DeformableConvolution: its reader of ONNX knows no such operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import openvino
    from openvino.frontend.onnx import ConversionExtension, NodeContext


def deformable_extension() -> ConversionExtension:
    """What ``openvino.convert_model`` takes as its ``extension``."""
    from openvino.frontend.onnx import ConversionExtension

    return ConversionExtension('DeformConv', _convert)


def _convert(node: NodeContext) -> list[openvino.Output]:
    from openvino import opset13 as ops

    source, weight, offset, *more = (node.get_input(place) for place in range(node.get_input_size()))
    bias, mask = (*more, None, None)[:2]
    height, width = node.get_attribute('pads')[:2]
    out = ops.deformable_convolution(
        source,
        offset,
        weight,
        strides=node.get_attribute('strides'),
        pads_begin=[height, width],
        pads_end=[height, width],
        dilations=node.get_attribute('dilations'),
        mask=mask,
        group=node.get_attribute('group'),
        deformable_group=node.get_attribute('offset_group'),
        # as mmcv and ONNX do: what lies up to one pixel outside is mixed with zeros
        bilinear_interpolation_pad=True,
    )
    if bias is not None:
        out = ops.add(out, ops.reshape(bias, np.array([1, -1, 1, 1]), special_zero=False))
    return [out.output(0)]
