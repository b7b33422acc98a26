"""TensorRT's rules for explicit quantization: symmetric int8, one scale per activation, float biases.

After NVIDIA's TensorRT documentation ("Explicit Quantization", "Quantization Schemes") and the operators that its ONNX
parser supports (onnx-tensorrt, docs/operators.md). TensorRT itself is not needed to check them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from mmdet_ptq.deploy.onnx.nodes import check_activation_formats
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers.selection import build_quantizer
from mmdet_ptq.wrapping import Structure

if TYPE_CHECKING:
    import onnx

# standard operators that the parser does not know (10.15; 11 knows no fewer)
_UNKNOWN = frozenset(
    (
        'AffineGrid',
        'Bernoulli',
        'BitShift',
        'BitwiseAnd',
        'BitwiseNot',
        'BitwiseOr',
        'BitwiseXor',
        'Col2Im',
        'CenterCropPad',
        'Compress',
        'ConcatFromSequence',
        'ConvInteger',
        'DFT',
        'Det',
        'DynamicQuantizeLinear',
        'ImageDecoder',
        'MatMulInteger',
        'MaxRoiPool',
        'MaxUnpool',
        'MelWeightMatrix',
        'Multinomial',
        'NegativeLogLikelihoodLoss',
        'Optional',
        'OptionalGetElement',
        'OptionalHasElement',
        'QLinearConv',
        'QLinearMatMul',
        'RegexFullMatch',
        'SequenceAt',
        'SequenceConstruct',
        'SequenceEmpty',
        'SequenceErase',
        'SequenceInsert',
        'SequenceLength',
        'SequenceMap',
        'SoftmaxCrossEntropyLoss',
        'SplitToSequence',
        'StringConcat',
        'StringNormalizer',
        'StringSplit',
        'TfIdfVectorizer',
        'Unique',
    )
)
_TYPES = ('FLOAT', 'FLOAT16', 'BFLOAT16', 'INT8', 'INT32', 'INT64', 'BOOL')
_AGAIN = 'export the detector with --to tensorrt'


def check_tensorrt_formats(structure: Structure) -> None:
    """Refuses number formats that TensorRT's explicit quantization does not have.

    Args:
        structure: The structure of the quantized detector.

    Raises:
        PTQError: An activation has a zero point or more than 8 bits, or an 8-bit weight a zero point.
    """
    check_activation_formats(structure)
    for name, entry in structure.activations.items():
        if entry.spec['bits'] > 8:
            raise PTQError(
                f"the activation {name} has {entry.spec['bits']} bits, and TensorRT's integers have 8; "
                'set `bits=8` where it is configured, or leave that part in float, and calibrate again.'
            )
        if not entry.spec['symmetric']:
            raise PTQError(
                f'the activation {name} is quantized with a zero point, which TensorRT does not have; set '
                '`ptq.activations.quantizer.symmetric=True`, and calibrate again.'
            )
    for layer in structure.layers:
        # with fewer bits, code minus zero point is an int8 without one
        if layer.weight and layer.weight['bits'] == 8 and build_quantizer(layer.weight).has_zero_point:
            raise PTQError(
                f'the weight of {layer.name} is quantized with a zero point, which TensorRT does not have; '
                'set `ptq.weights.quantizer.symmetric=True`, and calibrate again.'
            )


def check_tensorrt_rules(path: str | os.PathLike) -> None:
    """Checks an ONNX file against TensorRT's rules for explicit quantization.

    Args:
        path: The ``.onnx`` file.

    Raises:
        PTQError: A node breaks a rule; names the first.
    """
    import onnx

    check_tensorrt_model(onnx.load(os.fspath(path), load_external_data=False))


def check_tensorrt_model(model: onnx.ModelProto) -> None:
    """:func:`check_tensorrt_rules` of a model in memory."""
    graph = _Graph(model.graph)
    for node in model.graph.node:
        told = graph.broken_rule(node)
        if told is not None:
            raise PTQError(f'TensorRT cannot take the node {node.name or node.output[0]!r} ({node.op_type}): {told}.')


class _Graph:
    """Who computes and who reads each value of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {entry.name: entry for entry in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in graph.node:
            for place, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, place))

    def broken_rule(self, node: onnx.NodeProto) -> str | None:
        """What is wrong with a node; None if nothing is."""
        if node.domain not in ('', 'ai.onnx') or node.op_type in _UNKNOWN:
            return 'its ONNX parser does not know this operation; express it by others, or leave it out of the network'
        if node.op_type == 'DequantizeLinear' and node.input[0] in self.constants:
            return self._weight(node)
        if node.op_type in ('QuantizeLinear', 'DequantizeLinear'):
            return self._activation(node)
        for name in node.input:
            if name in self.constants and self._type(name) not in _TYPES:
                return f'its constant {name} is of type {self._type(name)}, which TensorRT does not compute; {_AGAIN}'
        for name in node.input:
            source = self.producers.get(name)
            if source is not None and source.op_type == 'QuantizeLinear':
                return f'it reads codes, which only DequantizeLinear may; {_AGAIN}'
        return None

    def _activation(self, node: onnx.NodeProto) -> str | None:
        if self._scales(node) != 1:
            return f'an activation has one scale per tensor, this one has several; {_AGAIN}'
        if len(node.input) < 3:
            return f'without a zero point ONNX quantizes to uint8; {_AGAIN}'
        if node.op_type == 'DequantizeLinear':
            source = self.producers.get(node.input[0])
            if source is None or source.op_type != 'QuantizeLinear':
                return f'it reads codes that no QuantizeLinear wrote; {_AGAIN}'
        return self._symmetric(node)

    def _weight(self, node: onnx.NodeProto) -> str | None:
        dtype, shape = self._type(node.input[0]), tuple(self.constants[node.input[0]].dims)
        read = self.readers.get(node.output[0], [])
        if dtype == 'INT32' or any(place == 2 for _, place in read):
            return f'biases stay float, this one is quantized; {_AGAIN}'
        if dtype != 'INT8':
            return f'weights are int8, this one is {dtype}; {_AGAIN}'
        if self._scales(node) != 1:
            axis = _attribute(node, 'axis', 1) % len(shape)
            if any(axis != _output_axis(reader, len(shape)) for reader, _ in read) or self._scales(node) != shape[axis]:
                return f'a weight has its scales per output channel, this one along axis {axis}; {_AGAIN}'
        return self._symmetric(node)

    def _symmetric(self, node: onnx.NodeProto) -> str | None:
        from onnx import numpy_helper

        if (numpy_helper.to_array(self.constants[node.input[1]]) <= 0).any():
            return f'scales are positive, this one is not; {_AGAIN}'
        if len(node.input) < 3:
            return None
        if self._type(node.input[2]) != 'INT8':
            return f'codes are int8, these are {self._type(node.input[2])}; {_AGAIN}'
        if numpy_helper.to_array(self.constants[node.input[2]]).any():
            return (
                'zero points are 0, this one is not; set `ptq.activations.quantizer.symmetric=True`, calibrate and '
                'export again'
            )
        return None

    def _scales(self, node: onnx.NodeProto) -> int:
        return int(np.prod(self.constants[node.input[1]].dims)) if node.input[1] in self.constants else 0

    def _type(self, name: str) -> str:
        import onnx

        return onnx.TensorProto.DataType.Name(self.constants[name].data_type) if name in self.constants else 'unknown'


def _output_axis(reader: onnx.NodeProto, rank: int) -> int | None:
    """Axis of the output channels in the weight of a layer; None where a weight is read by nothing that has them."""
    if reader.op_type in ('Conv', 'ConvTranspose'):
        return int(reader.op_type == 'ConvTranspose')
    if reader.op_type == 'Gemm':
        return 1 - _attribute(reader, 'transB', 0)
    return rank - 1 if reader.op_type == 'MatMul' else None


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
