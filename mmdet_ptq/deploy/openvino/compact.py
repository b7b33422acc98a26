"""OpenVINO's model file without what nobody reads: its text is as large as the codes of small detectors.

Nothing of it changes what OpenVINO computes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from mmdet_ptq.deploy.openvino.model import TRANSPOSED

if TYPE_CHECKING:
    import openvino

# what the conversion leaves behind; the framework's entry is our meta a second time
_LEFT_BEHIND = ('framework', 'conversion_parameters')


def compact(model: openvino.Model, calls: Collection[str]) -> None:
    """Stores equal constants once and drops what the conversion leaves behind, in place.

    Args:
        model: The converted model.
        calls: Names of the layers' calls.
    """
    share_constants(model)
    _name_behind_biases(model, calls)
    for entry in _LEFT_BEHIND:
        if entry in model.rt_info:
            del model.rt_info[entry]


def _name_behind_biases(model: openvino.Model, calls: Collection[str]) -> None:
    """Names transposed convolutions as convolutions are: where they have biases, the addition got the layer's name."""
    for op in model.get_ops():
        if op.get_type_name() == 'Add' and op.get_friendly_name() in calls:
            for value in op.input_values():
                if value.get_node().get_type_name() in TRANSPOSED:
                    value.get_node().set_friendly_name(f'{op.get_friendly_name()}/WithoutBiases')


def share_constants(model: openvino.Model) -> int:
    """Lets operations read one of several equal constants.

    Returns:
        How many constants nobody reads any more.
    """
    first, removed = {}, 0
    for op in model.get_ordered_ops():
        # weights that share their codes, and not their scales, become float
        if op.get_type_name() != 'Constant' or op.get_element_type().get_type_name() == 'i8':
            continue
        key = (op.get_element_type().get_type_name(), tuple(op.get_output_shape(0)), op.get_data().tobytes())
        kept = first.setdefault(key, op)
        if kept is not op:
            for reader in op.output(0).get_target_inputs():
                reader.replace_source_output(kept.output(0))
            removed += 1
    return removed


def strip_layout(path: Path) -> None:
    """Removes line breaks and indentation from a model's text."""
    tree = ElementTree.parse(path)
    for element in tree.iter():
        for kind in ('text', 'tail'):
            if not (getattr(element, kind) or '').strip():
                setattr(element, kind, None)
    tree.write(path, encoding='utf-8', xml_declaration=True)
