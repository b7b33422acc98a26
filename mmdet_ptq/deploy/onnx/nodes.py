"""What is simulated is what is exported: quantizers write nodes of their own while the detector itself is exported.

A quantizer becomes one node of the domain ``mmdet_ptq`` that carries its name, and no constants: torch's exporter takes
time that grows with the square of their number. Afterwards each becomes QuantizeLinear and DequantizeLinear with its
constants, in the form that the runtime fuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_ptq.deploy.integers.kernels import SIGNED_ZERO
from mmdet_ptq.deploy.integers.weights import integer_weight
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.wrapping import Structure, float_weight, quantized_weights
from mmdet_ptq.wrapping.names import run_name
from mmdet_ptq.wrapping.state import STATE

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21
DOMAIN = 'mmdet_ptq'
ACTIVATION, WEIGHT = 'Activation', 'Weight'
CODES = ':codes'
AFFINE = 'mmdet_ptq.AffineQuantizer'
_symbolic = torch.onnx.ops.symbolic


def check_activation_formats(structure: Structure) -> None:
    """Refuses activation formats that ONNX's QuantizeLinear does not know.

    Raises:
        PTQError: A quantizer is of a class of its own.
    """
    for name, entry in structure.activations.items():
        if entry.spec['type'] != AFFINE:
            raise PTQError(
                f'the activation {name} has the format {entry.spec["type"]}, which ONNX cannot express; '
                f'use `ptq.activations.quantizer=dict(type={AFFINE!r})`.'
            )


@contextmanager
def quantizer_nodes(detector: nn.Module) -> Iterator[None]:
    """While it lasts, every quantizer of a detector writes its node when the detector is exported.

    Args:
        detector: The calibrated quantized detector.
    """
    changed: list[nn.Module] = []

    def replace(module: nn.Module, forward: Callable) -> None:
        module.forward = forward
        changed.append(module)

    try:
        for name, quantizer in getattr(detector, STATE).activations.items():
            replace(quantizer, _Node(ACTIVATION, name))
        for name, quantized in quantized_weights(detector).items():
            replace(quantized, _Node(WEIGHT, name))
        yield
    finally:
        for module in changed:
            del module.forward


class _Node:
    """Stands in for a quantizer's forward."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name

    def __call__(self, x: Tensor, rounding: Tensor | None = None) -> Tensor:
        return _symbolic(
            f'{DOMAIN}::{self.kind}', (x,), attrs=dict(name=self.name), dtype=torch.float32, shape=x.shape, version=1
        )


def expand_quantizers(
    graph: ir.Graph, detector: nn.Module, clip_codes: bool, unsigned: bool, rounds_wide: bool
) -> None:
    """Replaces every quantizer's node by QuantizeLinear and DequantizeLinear, in place.

    Weights become integer values and DequantizeLinear; those that no int8 holds stay float.

    Args:
        graph: The exported graph.
        detector: The detector it was exported from.
        clip_codes: How activations of fewer than 8 bits are kept in range: codes are clipped after QuantizeLinear,
            otherwise values before it. The first is what ONNX Runtime fuses, the second what OpenVINO does.
        unsigned: Whether symmetric activations of 8 bits and fewer are written as bytes without sign, with the zero
            point :data:`mmdet_ptq.deploy.integers.kernels.SIGNED_ZERO`: ONNX Runtime's kernels for x86 take no others.
        rounds_wide: Whether activations of 16 bits are rounded; otherwise they are only clipped to their range.
            OpenVINO computes them in float and returns wrong values where they are quantized.
    """
    activations, weights = getattr(detector, STATE).activations, quantized_weights(detector)
    calls: Counter[tuple[str, str]] = Counter()
    writer = _Writer(graph, clip_codes, unsigned, rounds_wide)
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        name = node.attributes['name'].as_string()
        label = run_name(name, calls[node.op_type, name])
        calls[node.op_type, name] += 1
        if node.op_type == ACTIVATION:
            out = writer.activation(node, name, label, activations[name])
        else:
            out = writer.weight(node, name, label, weights[name], detector.get_submodule(name))
        node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    graph.opset_imports.pop(DOMAIN, None)


class _Writer:
    """Writes the nodes of quantizers into a graph, constants once per quantizer."""

    def __init__(self, graph: ir.Graph, clip_codes: bool, unsigned: bool, rounds_wide: bool) -> None:
        self.graph = graph
        self.clip_codes = clip_codes
        self.unsigned = unsigned
        self.rounds_wide = rounds_wide
        self.constants: dict[str, ir.Value] = {}

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        from mmdet_ptq.deploy.onnx.graph import add_constant

        if name not in self.constants:
            self.constants[name] = add_constant(self.graph, name, array)
        return self.constants[name]

    def insert(self, before: ir.Node, op_type: str, inputs: list, name: str, axis: int | None = None) -> ir.Value:
        import onnx_ir as ir

        from mmdet_ptq.deploy.onnx.graph import add_node

        # codes are of the type of their zero point
        dtype = {'QuantizeLinear': inputs[-1].dtype, 'Clip': inputs[0].dtype}.get(op_type, ir.DataType.FLOAT)
        attributes, shape = {} if axis is None else dict(axis=axis), before.outputs[0].shape
        return add_node(before, op_type, inputs, name, attributes, shape=shape, dtype=dtype)

    def activation(self, node: ir.Node, name: str, label: str, quantizer: AffineQuantizer) -> ir.Value:
        """QuantizeLinear and DequantizeLinear of an activation; its codes are called ``label:codes``."""
        x, dtype, (low, high) = node.inputs[0], _code_type(quantizer), quantizer.code_range
        axis = None
        if quantizer.num_channels is not None:
            axis = quantizer.channel_axis + (len(x.shape) if quantizer.channel_axis < 0 else 0)
        scale, zero = quantizer.positive_scale().detach().cpu().numpy(), quantizer.zero_point.cpu().numpy()
        if self.unsigned and dtype is np.int8:
            dtype, low, high, zero = np.uint8, low + SIGNED_ZERO, high + SIGNED_ZERO, zero + SIGNED_ZERO
        pair = [self.constant(f'{name}:scale', scale), self.constant(f'{name}:zero_point', zero.astype(dtype))]
        wide = quantizer.bits > 8
        narrow = (low, high) != (np.iinfo(dtype).min, np.iinfo(dtype).max)
        # runtimes clip no codes of 16 bits
        clip_codes = self.clip_codes and not wide
        if (narrow or (wide and not self.rounds_wide)) and not clip_codes:
            shape = [-1 if place == axis else 1 for place in range(len(x.shape))] if axis is not None else ()
            for op_type, code in (('Max', low), ('Min', high)):
                bound = ((code - zero) * scale).astype(np.float32).reshape(shape)
                x = self.insert(
                    node,
                    op_type,
                    [x, self.constant(f'{name}:{op_type.lower()}_value', bound)],
                    f'{label}:{op_type.lower()}',
                )
        if wide and not self.rounds_wide:
            return x
        codes = self.insert(node, 'QuantizeLinear', [x, *pair], f'{label}{CODES}', axis)
        if narrow and clip_codes:
            ends = [
                self.constant(f'{name}:{end}', np.array(code, dtype))
                for end, code in (('lowest', low), ('highest', high))
            ]
            codes = self.insert(node, 'Clip', [codes, *ends], f'{label}:clipped')
        return self.insert(node, 'DequantizeLinear', [codes, *pair], f'{label}:value', axis)

    def weight(self, node: ir.Node, name: str, label: str, quantized: nn.Module, layer: nn.Module) -> ir.Value:
        """DequantizeLinear of a weight's integers, or the float weight where these fit no int8."""
        weight, layout = float_weight(layer), quantized.layout
        integers = integer_weight(quantized.quantizer, quantized.codes(weight))
        if not integers.fits_int8 or (layout.transposed and layout.groups > 1):
            values = layout.from_rows(integers.values(), weight.shape)
            return self.constant(f'{name}.weight_float', values.detach().cpu().numpy())
        values = layout.from_rows(integers.integers(), weight.shape).to(torch.int8).cpu().numpy()
        inputs = [
            self.constant(f'{name}.weight', values),
            self.constant(f'{name}.weight_scale', integers.scale.cpu().numpy()),
        ]
        return self.insert(node, 'DequantizeLinear', inputs, f'{label}.weight_value', 1 if layout.transposed else 0)


def _code_type(quantizer: AffineQuantizer) -> type:
    if quantizer.bits > 8:
        return np.int16 if quantizer.symmetric else np.uint16
    return np.int8 if quantizer.symmetric else np.uint8
