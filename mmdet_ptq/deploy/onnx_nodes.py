"""What is simulated is what is exported: quantizers write ONNX nodes while the detector itself is exported."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import PTQError
from ..quantizers import AffineQuantizer
from ..wrapping import Structure, float_weight, quantized_weights
from ..wrapping.inputs import STATE
from ..wrapping.weights import QuantizedWeight
from .integer_weights import IntegerWeight, integer_weight

OPSET = 21
AFFINE = 'mmdet_ptq.AffineQuantizer'
_symbolic = torch.onnx.ops.symbolic


@contextmanager
def onnx_quantizers(detector: nn.Module, clip_codes: bool) -> Iterator[None]:
    """While it lasts, every quantizer of a detector writes QuantizeLinear and DequantizeLinear when it is exported.

    Weights are written as integer values and DequantizeLinear. Weights that no int8 holds stay float.

    Args:
        detector: The calibrated quantized detector.
        clip_codes: How activations of fewer than 8 bits are kept in range: codes are clipped after QuantizeLinear,
            otherwise values before it. The first is what ONNX Runtime fuses, the second what OpenVINO does.
    """
    changed: list[nn.Module] = []

    def replace(module: nn.Module, forward: Callable) -> None:
        module.forward = forward
        changed.append(module)

    try:
        for quantizer in getattr(detector, STATE).activations.values():
            replace(quantizer, _ActivationNodes(quantizer, clip_codes))
        for name, quantized in quantized_weights(detector).items():
            layer = detector.get_submodule(name)
            weight = deployed_weight(quantized, float_weight(layer))
            if weight.fits_int8 and not (quantized.layout.transposed and quantized.layout.groups > 1):
                replace(quantized, _WeightNodes(quantized, float_weight(layer).shape, weight))
        yield
    finally:
        for module in changed:
            del module.forward


def deployed_weight(quantized: QuantizedWeight, weight: Tensor) -> IntegerWeight:
    """The integers that a calibrated weight stands for."""
    return integer_weight(quantized.quantizer, quantized.codes(weight))


def check_activation_formats(structure: Structure) -> None:
    """Refuses activation formats that ONNX's QuantizeLinear does not know.

    Raises:
        PTQError: A quantizer is of a class of its own.
    """
    for name, entry in structure.activations.items():
        if entry['spec']['type'] != AFFINE:
            raise PTQError(f"the activation {name} has the format {entry['spec']['type']}, which ONNX cannot express; "
                           f'use `ptq.activations.quantizer=dict(type={AFFINE!r})`.')


def _code_type(bits: int, symmetric: bool) -> torch.dtype:
    if bits > 8:
        return torch.int16 if symmetric else torch.uint16
    return torch.int8 if symmetric else torch.uint8


class _ActivationNodes:
    """Stands in for an activation quantizer's forward."""

    def __init__(self, quantizer: AffineQuantizer, clip_codes: bool) -> None:
        self.dtype = _code_type(quantizer.bits, quantizer.symmetric)
        self.scale = quantizer.positive_scale().detach().clone()
        # torch has no conversion to uint16 in every kernel
        self.zero = quantizer.zero_point.detach().to(torch.int64).to(self.dtype)
        self.axis = None if quantizer.num_channels is None else quantizer.channel_axis
        info, (low, high) = torch.iinfo(self.dtype), quantizer.code_range
        self.narrow = (low, high) != (info.min, info.max)
        self.clip_codes = clip_codes
        self.code_bounds = torch.tensor(low).to(self.dtype), torch.tensor(high).to(self.dtype)
        zero = quantizer.zero_point.detach()
        self.lowest, self.highest = (low - zero) * self.scale, (high - zero) * self.scale

    def __call__(self, x: Tensor, rounding: Tensor | None = None) -> Tensor:
        axis = self.axis if self.axis is None or self.axis >= 0 else self.axis + x.dim()
        attrs = {} if axis is None else dict(axis=axis)
        if self.narrow and not self.clip_codes:
            shape = [1] * x.dim()
            if axis is not None:
                shape[axis] = -1
            x = torch.clamp(x, self.lowest.view(shape), self.highest.view(shape))
        codes = _symbolic('QuantizeLinear', (x, self.scale, self.zero), attrs=attrs, dtype=self.dtype, shape=x.shape,
                          version=OPSET)
        if self.narrow and self.clip_codes:
            codes = _symbolic('Clip', (codes, *self.code_bounds), dtype=self.dtype, shape=x.shape, version=OPSET)
        return _symbolic('DequantizeLinear', (codes, self.scale, self.zero), attrs=attrs, dtype=torch.float32,
                         shape=x.shape, version=OPSET)


class _WeightNodes:
    """Stands in for a weight's parametrization."""

    def __init__(self, quantized: QuantizedWeight, shape: torch.Size, weight: IntegerWeight) -> None:
        self.shape = shape
        self.values = quantized.layout.from_rows(weight.integers(), shape).to(torch.int8).contiguous()
        self.scale = weight.scale
        self.axis = 1 if quantized.layout.transposed else 0

    def __call__(self, weight: Tensor) -> Tensor:
        return _symbolic('DequantizeLinear', (self.values, self.scale), attrs=dict(axis=self.axis),
                         dtype=torch.float32, shape=self.shape, version=OPSET)
