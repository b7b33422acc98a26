"""OpenVINO against the simulation: how many integer codes that the layers read are the same.

OpenVINO leaves out the quantizers between the layers, so what both have is what the layers read.
"""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PTQError
from ..wrapping import quantized_weights
from ..wrapping.inputs import STATE, QuantizedInput, quantize_only, with_input
from .compare import TensorAgreement
from .meta import read_meta
from .onnx_export import require
from .raw_outputs import RawOutputs
from .runtimes.openvino import FLOAT32, META, layer_operations

if TYPE_CHECKING:
    import openvino


def compare_layer_inputs(detector: nn.Module, model: str | os.PathLike, image: Tensor, follow: bool = False,
                         between: bool = True) -> list[TensorAgreement]:
    """Compares the codes that every layer reads between the simulation and OpenVINO.

    Args:
        detector: The quantized detector the model was exported from.
        model: The ``.xml`` file.
        image: (N, 3, H, W), normalized.
        follow: Whether the simulation goes on with what OpenVINO's layer reads, so that each is compared for itself.
            Defaults to False.
        between: Whether the simulation quantizes between the layers, as it was calibrated; without, it does what
            OpenVINO is given. Defaults to True.

    Returns:
        One entry per call of a layer, in the order of the network, named like the layer; ``#k`` marks further calls.

    Raises:
        PTQError: OpenVINO computes something else as soon as it is watched, or lacks a layer.
    """
    require('openvino', extra='openvino')
    found = _runtime_inputs(model, image.cpu().numpy())
    state = getattr(detector, STATE)
    read = [name for name in state.activations if state.readers[name]]
    only = nullcontext() if between else quantize_only(detector, read, quantized_weights(detector))
    agreements: list[TensorAgreement] = []
    with torch.no_grad(), only, _compared(detector, found, follow, agreements):
        RawOutputs(detector)(image)
    return agreements


def _runtime_inputs(path: str | os.PathLike, image: np.ndarray) -> dict[str, np.ndarray]:
    """Name of every call of a layer to what it reads, dequantized, in the detector's order of channels."""
    import openvino
    core = openvino.Core()
    model = core.read_model(os.fspath(path))
    meta = read_meta(model.get_rt_info([META]).astype(str))
    plain = _run(core, model, image)
    inputs = {call: op.input_value(0) for call, op in layer_operations(model, meta['layers']).items()}
    put_out = [_place(result.input_value(0)) for result in model.get_results()]
    # a tensor that several layers read is put out once
    added = {_place(value): value for value in inputs.values() if _place(value) not in put_out}
    model.add_outputs(list(added.values()))
    watched = _run(core, model, image)
    if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(plain, watched, strict=False)):
        raise PTQError(f'OpenVINO computes other outputs of {os.fspath(path)!r} as soon as its tensors are read; '
                       'compare in ONNX Runtime.')
    values = dict(zip([*put_out, *added], watched, strict=True))
    found = {call: values[_place(value)] for call, value in inputs.items()}
    for call, offsets in meta.get('folded', {}).items():
        found[call] = _slices(found[call], offsets)
    return found


def _place(value: openvino.Output) -> tuple[str, int]:
    return value.get_node().get_friendly_name(), value.get_index()


def _slices(image: np.ndarray, offsets: list[list[int]]) -> np.ndarray:
    """What a convolution of an image, which took the place of one of its slices, would read there."""
    step = round(len(offsets) ** 0.5)
    return np.concatenate([image[:, :, row::step, column::step] for row, column in offsets], axis=1)


def _run(core: openvino.Core, model: openvino.Model, image: np.ndarray) -> list[np.ndarray]:
    compiled = core.compile_model(model, 'CPU', FLOAT32)
    found = compiled([image])
    return [found[index].copy() for index in range(len(compiled.outputs))]


@contextmanager
def _compared(detector: nn.Module, found: Mapping[str, np.ndarray], follow: bool,
              agreements: list[TensorAgreement]) -> Iterator[None]:
    """Every layer notes, in one forward pass, how far it reads what OpenVINO's layer read."""
    state, calls = getattr(detector, STATE), Counter()

    def hook(layer: str, names: list[str | None]):
        def compare(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            call = calls[layer]
            calls[layer] += 1
            name, label = names[call % len(names)], f'{layer}#{call}' if call else layer
            if name is None:
                return args, kwargs
            if label not in found:
                raise PTQError(f"OpenVINO's model has no layer {label}; export it again.")

            def compared(simulated: Tensor) -> Tensor:
                quantizer = state.activations[name]
                theirs = torch.from_numpy(_like(found[label], simulated.shape)).to(simulated)
                difference = (quantizer.encode(theirs) - quantizer.encode(simulated)).abs()
                agreements.append(
                    TensorAgreement(label, float((difference == 0).double().mean()), int(difference.max())))
                return quantizer(theirs) if follow else simulated

            return with_input(args, kwargs, compared)
        return compare

    with ExitStack() as stack:
        for quantized in state.hooks:
            if isinstance(quantized, QuantizedInput):
                # behind the quantizer's own hook
                stack.callback(detector.get_submodule(quantized.layer).register_forward_pre_hook(
                    hook(quantized.layer, quantized.names), with_kwargs=True).remove)
        yield


def _like(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in the shape that the detector's layer reads: matrix products may have theirs flattened."""
    return np.ascontiguousarray(values.reshape(shape))
