"""Exported against simulated, tensor by tensor: how many integer codes are the same."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_ptq.deploy.agreement import TensorAgreement
from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic
from mmdet_ptq.deploy.integers.kernels import SIGNED_ZERO
from mmdet_ptq.deploy.network.canvas import with_size
from mmdet_ptq.deploy.network.parts import Part, part_path, parts_of
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.deploy.onnx.export import model_meta
from mmdet_ptq.deploy.onnx.nodes import CODES
from mmdet_ptq.deploy.requirements import require
from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.wrapping.names import activation_of, run_name
from mmdet_ptq.wrapping.state import STATE


def compare_codes(
    detector: nn.Module,
    model: str | os.PathLike,
    image: Tensor,
    follow: bool = False,
    exact: bool = False,
    outputs: list[tuple[Tensor, Tensor]] | None = None,
) -> list[TensorAgreement]:
    """Compares the codes of every quantized tensor between the simulation and ONNX Runtime.

    Args:
        detector: The quantized detector the model was exported from.
        model: The ``.onnx`` file, exported for ONNX Runtime.
        image: (N, C, H, W), normalized.
        follow: Whether the simulation goes on with the runtime's codes after each tensor. Each is then compared for
            itself; otherwise a code that falls to the other side of a boundary changes what comes behind, too.
            Defaults to False.
        exact: Whether the simulation computes as integer kernels do, see
            :func:`mmdet_ptq.deploy.integers.arithmetic.integer_arithmetic`. Defaults to False.
        outputs: Takes each raw output of the simulation, and the runtime's beside it, if given. The runtime computes
            them where its tensors are read: elsewhere it fuses otherwise, which changes last bits.

    Returns:
        One entry per quantized tensor, in the order of the network.
    """
    require('onnx', 'onnxruntime', extra='onnxruntime')
    agreements = []
    for part in parts_of(detector, image):
        file = part_path(model, part.name) if part.name else model
        found, ours, theirs = _compare_part(detector, part, file, follow, exact)
        agreements += found
        if outputs is not None:
            outputs += zip(ours, theirs, strict=True)
    return agreements


def _compare_part(
    detector: nn.Module, part: Part, model: str | os.PathLike, follow: bool, exact: bool
) -> tuple[list[TensorAgreement], tuple[Tensor, ...], list[Tensor]]:
    found, theirs = _runtime_codes(model, [tensor.cpu().numpy() for tensor in part.inputs])
    # models of older versions do not have the entry: in them nothing was folded
    for name, offsets in model_meta(model).get('space_to_depth', {}).items():
        found[name] = _sliced(found[name], offsets)
    activations = getattr(detector, STATE).activations
    found = {
        name: codes - np.int16(SIGNED_ZERO) if _is_shifted(codes, activations[activation_of(name)]) else codes
        for name, codes in found.items()
    }
    arithmetic = integer_arithmetic(detector) if exact else nullcontext()
    with torch.no_grad(), arithmetic, recorded_codes(detector, found if follow else {}) as simulated:
        ours = RawOutputs(detector, part)(*part.inputs)
    agreements = []
    for name, codes in simulated.items():
        if name in found:
            difference = np.abs(_unpadded(found[name], codes.shape).astype(np.int64) - codes.cpu().numpy())
            agreements.append(TensorAgreement(name, float((difference == 0).mean()), int(difference.max())))
    return agreements, ours, [torch.from_numpy(output) for output in theirs]


def _is_shifted(codes: np.ndarray, quantizer: AffineQuantizer) -> bool:
    """Whether signed codes were written as bytes without sign."""
    return quantizer.symmetric and codes.dtype == np.uint8


def _sliced(codes: np.ndarray, offsets: list[list[int]]) -> np.ndarray:
    """The codes behind SpaceToDepth in the order of the slices that the simulation quantizes."""
    blocks, places = np.split(codes, len(offsets), axis=1), sorted(offsets)
    return np.concatenate([blocks[places.index(offset)] for offset in offsets], axis=1)


def _unpadded(codes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Without the border that an exported model pads a tensor with before it quantizes it."""
    place = tuple(
        slice((have - want) // 2, (have - want) // 2 + want) for have, want in zip(codes.shape, shape, strict=True)
    )
    return codes[place]


def _runtime_codes(
    model: str | os.PathLike, inputs: list[np.ndarray]
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The codes of each quantized tensor, and the outputs."""
    import onnx
    import onnxruntime

    proto = onnx.load(os.fspath(model))
    inferred = onnx.shape_inference.infer_shapes(proto).graph.value_info
    types = {info.name: info for info in inferred}
    clipped = {
        node.input[0]: node.output[0]
        for node in proto.graph.node
        if node.op_type == 'Clip' and node.input[0].endswith(CODES)
    }
    names = [out for node in proto.graph.node for out in node.output if out.endswith(CODES)]
    # codes of fewer than 8 bits are clipped after they are rounded
    read = {name: clipped.get(name, name) for name in names}
    outputs = [given.name for given in proto.graph.output]
    proto.graph.output.extend(types[value] for value in read.values())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=['CPUExecutionProvider'])
    taken = [given.name for given in session.get_inputs()]
    given = dict(zip(taken, with_size(tuple(inputs), len(taken)), strict=True))
    values = session.run([*outputs, *read.values()], given)
    codes = zip(read, values[len(outputs) :], strict=True)
    return {name.removesuffix(CODES): value for name, value in codes}, values[: len(outputs)]


@contextmanager
def recorded_codes(detector: nn.Module, followed: Mapping[str, np.ndarray]) -> Iterator[dict[str, Tensor]]:
    """The codes of every activation quantizer in one forward pass, which goes on with the given ones."""
    found: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def hook(name: str):
        def record(quantizer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            key = run_name(name, calls[name])
            calls[name] += 1
            found[key] = quantizer.encode(args[0])
            if key not in followed:
                return None
            codes = np.ascontiguousarray(_unpadded(followed[key], output.shape)).astype(np.int32)
            return quantizer.decode(torch.from_numpy(codes).to(output.device))

        return record

    handles = [
        quantizer.register_forward_hook(hook(name)) for name, quantizer in getattr(detector, STATE).activations.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
