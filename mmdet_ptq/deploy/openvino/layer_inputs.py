"""What layers read in OpenVINO: one run of the model with all of it put out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmdet_ptq.deploy.network.canvas import with_size
from mmdet_ptq.deploy.network.meta import read_meta
from mmdet_ptq.deploy.openvino.model import FLOAT32, META, layer_operations, shared_core
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.names import factors_of

if TYPE_CHECKING:
    import openvino


def openvino_inputs(path: str | os.PathLike, *tensors: Tensor) -> dict[str, np.ndarray]:
    """What every call of a layer reads in OpenVINO, dequantized, in the detector's order of channels.

    Args:
        path: The ``.xml`` file.
        *tensors: What the network reads: the image, (N, C, H, W), normalized.

    Returns:
        Name of the layer, with ``#k`` for further calls, to the tensor; and the names of what products of activations
        read (:func:`mmdet_ptq.wrapping.names.factors_of`).

    Raises:
        PTQError: OpenVINO computes something else as soon as it is watched.
    """
    model = shared_core().read_model(os.fspath(path))
    meta = read_meta(model.get_rt_info([META]).astype(str))
    read = {call: (op, 0) for call, op in layer_operations(model, meta['layers']).items()}
    for product, op in layer_operations(model, meta.get('products', ())).items():
        read.update({name: (op, side) for side, name in enumerate(factors_of(product))})
    values = _watched(model, path, tensors, [op.input_value(side) for op, side in read.values()])
    found = {name: values[_place(op.input_value(side))] for name, (op, side) in read.items()}
    for name, (op, side) in read.items():
        # OpenVINO reads a transposed tensor as it was before
        if op.get_attributes().get(f'transpose_{"ab"[side]}'):
            found[name] = np.swapaxes(found[name], -1, -2)
    for call, offsets in meta.get('folded', {}).items():
        found[call] = _slices(found[call], offsets)
    return found


def openvino_choices(path: str | os.PathLike, *tensors: Tensor) -> list[Tensor]:
    """Which queries a detector chose by their scores, choice after choice; see :func:`openvino_inputs`."""
    model = shared_core().read_model(os.fspath(path))
    chosen = [op.output(1) for op in model.get_ordered_ops() if op.get_type_name() == 'TopK']
    values = _watched(model, path, tensors, chosen)
    return [torch.from_numpy(values[_place(value)].astype(np.int64)) for value in chosen]


def _watched(
    model: openvino.Model, path: str | os.PathLike, tensors: tuple[Tensor, ...], wanted: Iterable[openvino.Output]
) -> dict[tuple[str, int], np.ndarray]:
    """Values inside a model by their places, from one run in which all of them are put out."""
    core, given = shared_core(), [tensor.cpu().numpy() for tensor in tensors]
    plain = run_model(core, model, given)
    put_out = [_place(result.input_value(0)) for result in model.get_results()]
    # a tensor that several layers read is put out once
    added = {_place(value): value for value in wanted if _place(value) not in put_out}
    model.add_outputs(list(added.values()))
    watched = run_model(core, model, given)
    if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(plain, watched, strict=False)):
        raise PTQError(
            f'OpenVINO computes other outputs of {os.fspath(path)!r} as soon as its tensors are read; '
            'compare in ONNX Runtime.'
        )
    return dict(zip([*put_out, *added], watched, strict=True))


def _place(value: openvino.Output) -> tuple[str, int]:
    return value.get_node().get_friendly_name(), value.get_index()


def _slices(image: np.ndarray, offsets: list[list[int]]) -> np.ndarray:
    """What a convolution of an image, which took the place of one of its slices, would read there."""
    step = round(len(offsets) ** 0.5)
    return np.concatenate([image[:, :, row::step, column::step] for row, column in offsets], axis=1)


def run_model(core: openvino.Core, model: openvino.Model, inputs: list[np.ndarray]) -> list[np.ndarray]:
    compiled = core.compile_model(model, 'CPU', FLOAT32)
    found = compiled(with_size(tuple(inputs), len(compiled.inputs)))
    return [found[index].copy() for index in range(len(compiled.outputs))]
