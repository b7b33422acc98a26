"""What the tensors of an OpenVINO model take, by its own inference of shapes, before it is compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mmdet_ptq.deploy.network.memory import Step, check_memory, input_shapes

if TYPE_CHECKING:
    import openvino

# their bodies have tensors, too, as often as they run
_BODIES = ('If', 'Loop', 'TensorIterator')


def check_openvino_memory(path: str | os.PathLike, model: openvino.Model, meta: dict) -> bool:
    """Refuses a model that takes more memory than its images explain.

    Args:
        path: The ``.xml`` file.
        model: What ``openvino.Core().read_model`` returned.
        meta: What it says about itself.

    Returns:
        Whether all sizes are known.

    Raises:
        PTQError: It does.
    """
    if model.is_dynamic():
        model = model.clone()
        try:
            model.reshape(dict(enumerate(input_shapes(meta)[: len(model.inputs)])))
        except RuntimeError:  # of any operation
            return False
    results = [_place(result.input_value(0)) for result in model.get_results()]
    stored = Path(path).with_suffix('.bin').stat().st_size
    return check_memory(path, list(_steps(model)), results, meta, stored)


def _steps(model: openvino.Model) -> Iterator[Step]:
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        # constants are as large as the file
        if kind not in ('Constant', 'Result'):
            made = {_place(value): None if kind in _BODIES else _bytes(value) for value in op.outputs()}
            yield Step(kind, [_place(value) for value in op.input_values()], made)


def _place(value: openvino.Output) -> str:
    """A name of a tensor that no other has."""
    op = value.get_node()
    return f'{op.get_friendly_name()}:{value.get_index()} ({op.get_name()})'


def _bytes(value: openvino.Output) -> int | None:
    shape = value.get_partial_shape()
    if shape.rank.is_dynamic or any(dim.get_max_length() < 0 for dim in shape):
        return None
    count = value.get_element_type().size
    for dim in shape:
        count *= dim.get_max_length()
    return count
