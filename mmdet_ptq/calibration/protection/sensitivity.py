"""Sensitivity: which tensor, and which part of the detector, costs detections when it alone is quantized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from mmdet_ptq.calibration.protection.damage import Damage, DamageMeter
from mmdet_ptq.calibration.protection.head_branches import OUTPUTS, Place, find_places
from mmdet_ptq.progress import track
from mmdet_ptq.wrapping import Structure
from mmdet_ptq.wrapping.names import product_of

ACTIVATION, WEIGHT = 'activation', 'weight'
BETWEEN = 'between the layers'


@dataclass(frozen=True)
class TensorSet:
    """What one override changes at once.

    An override of a layer's activations holds for all calls of the layer, and a tensor's format for all its readers:
    the inputs of a head that is shared over levels change together.

    Attributes:
        kind: ``'activation'`` or ``'weight'``.
        tensors: Activation names, or the one layer whose weight it is.
        layers: The layers the override has to name.
    """

    kind: str
    tensors: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Short name for tables."""
        more = f' (+{len(self.tensors) - 1})' if len(self.tensors) > 1 else ''
        return f'{"input" if self.kind == ACTIVATION else "weight"} of {self.layers[0]}{more}'


@dataclass
class TensorSensitivity:
    """One tensor, everything else float.

    Attributes:
        kind: ``'activation'`` or ``'weight'``.
        name: Activation name, or the layer whose weight it is.
        layers: Layers that read it, in the order of the structure; empty where none does.
        part: ``'backbone'``, ``'neck'``, ``'class branch'``, ...; ``'between the layers'`` where no layer reads it,
            except for what a head puts out, which belongs to the layer that writes it.
        level: The one level of priors it serves; None where several do.
        output: Whether its layers write outputs of the head, or it is one.
        bits: Bits of its codes.
        damage: What quantizing it does to the detections.
    """

    kind: str
    name: str
    layers: tuple[str, ...]
    part: str
    level: int | None
    output: bool
    bits: int
    damage: Damage

    @property
    def label(self) -> str:
        """How tables and pictures call it."""
        call = f' (call {self.name.partition("#")[2]})' if '#' in self.name else ''
        if not self.layers:
            if product := product_of(self.name):
                return f'{self.name.rpartition("/")[2]} factor of {product}'
            module, _, operation = self.name.partition(':')
            return (
                f'output of {module.replace("/", ".")}{call}'
                if operation.partition('#')[0] == 'out'
                else f'result of {self.name}'
            )
        return f'{"input" if self.kind == ACTIVATION else "weight"} of {self.layers[0]}{call}'


@dataclass
class GroupSensitivity:
    """All tensors of one part, one level or the outputs, everything else float."""

    name: str
    tensors: int
    damage: Damage


@dataclass
class Sensitivities:
    """The whole analysis.

    Attributes:
        num_images: Calibration images it was measured on.
        total: Everything quantized.
        groups: By loss, the worst first.
        tensors: By loss, the worst first.
    """

    num_images: int
    total: Damage
    groups: list[GroupSensitivity] = field(default_factory=list)
    tensors: list[TensorSensitivity] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain dicts and lists, for ``sensitivity.json``."""
        return asdict(self)


def tensor_sets(structure: Structure) -> list[TensorSet]:
    """Everything that overrides can change, in the order of the layers: activations, then weights."""
    readers = defaultdict(list)
    for layer in structure.layers:
        for name in dict.fromkeys(filter(None, layer.inputs)):
            readers[name].append(layer)
    sets, seen = [], set()
    for name in readers:
        if name in seen:
            continue
        tensors, layers, todo = {}, {}, [name]
        while todo:
            tensor = todo.pop()
            if tensor in tensors:
                continue
            tensors[tensor] = None
            for layer in readers[tensor]:
                layers[layer.name] = None
                todo += filter(None, layer.inputs)
        seen |= set(tensors)
        order = [layer.name for layer in structure.layers if layer.name in layers]
        sets.append(TensorSet(ACTIVATION, tuple(t for t in readers if t in tensors), tuple(order)))
    return sets + [TensorSet(WEIGHT, (layer.name,), (layer.name,)) for layer in structure.layers if layer.weight]


def unread(structure: Structure) -> list[str]:
    """The activations that no layer reads: with a dataflow, those between other operations and behind the heads."""
    read = {name for layer in structure.layers for name in layer.inputs}
    return [name for name in structure.activations if name not in read]


def split_kinds(sets: Sequence[TensorSet]) -> tuple[list[str], list[str]]:
    """Names of the activations and of the weights in some sets."""
    return tuple([t for s in sets if s.kind == kind for t in s.tensors] for kind in (ACTIVATION, WEIGHT))


def measure_sensitivity(
    detector: nn.Module, structure: Structure, batches: Sequence[dict[str, Any]], resume_file: Path | None = None
) -> Sensitivities:
    """Quantizes one tensor, then one part after the other, and measures what it does to the detections.

    Each costs one forward pass of the images; the layer's own output error is measured on the way. The output errors of
    tensors that are quantized where they are computed take one more pass for all of them together.

    Args:
        detector: The observed quantized detector, in eval mode; it is not changed.
        structure: Its structure.
        batches: A few calibration batches as a dataloader yields them.
        resume_file: Keeps finished measurements for an interrupted analysis. Defaults to None.

    Returns:
        Groups and tensors, ranked by the filtered global loss.
    """
    meter = DamageMeter(detector, structure, batches, resume_file)
    tensors = _tensors(structure, find_places(detector, structure, _one_image(batches[0])))
    groups = defaultdict(list)
    for tensor in tensors:
        groups[tensor.part].append(tensor)
        if tensor.output:
            groups[OUTPUTS].append(tensor)
        if tensor.level is not None:
            groups[f'level {tensor.level}'].append(tensor)
    result = Sensitivities(meter.num_images, meter.measure_all(), tensors=tensors)
    for name, members in track(list(groups.items()), description='sensitivity of parts'):
        damage = meter.measure(*_names(members), key=f'group {name}')
        result.groups.append(GroupSensitivity(name, len(members), damage))
    written = _written(structure)
    errors = meter.output_errors() if written else {}
    for tensor in track(tensors, description='sensitivity of tensors'):
        at_source = tensor.kind == ACTIVATION and tensor.name in written
        tensor.damage = meter.measure(
            *_names([tensor]), key=f'{tensor.kind} {tensor.name}', layers=() if at_source else tensor.layers
        )
        if at_source:
            tensor.damage = replace(tensor.damage, output_error=errors.get(tensor.name))
    # sorting is stable: equal losses stay in the order of the layers
    result.groups.sort(key=lambda group: -group.damage.loss)
    result.tensors.sort(key=lambda tensor: -tensor.damage.loss)
    return result


def _names(tensors: Sequence[TensorSensitivity]) -> tuple[list[str], list[str]]:
    return tuple([t.name for t in tensors if t.kind == kind] for kind in (ACTIVATION, WEIGHT))


def _one_image(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value[:1] for key, value in batch.items()}


def _tensors(structure: Structure, places: dict[tuple[str, int], Place]) -> list[TensorSensitivity]:
    """Every quantized tensor with its place, not measured yet."""
    readers, specs = defaultdict(list), {}
    for layer in structure.layers:
        for call, name in enumerate(layer.inputs):
            if name is not None:
                readers[ACTIVATION, name].append((layer, call))
                specs[ACTIVATION, name] = structure.activations[name].spec
        if layer.weight is not None:
            readers[WEIGHT, layer.name] = [(layer, call) for call in range(len(layer.inputs))]
            specs[WEIGHT, layer.name] = layer.weight
    found = []
    for (kind, name), calls in readers.items():
        at = [places[layer.name, call] for layer, call in calls if (layer.name, call) in places]
        parts, levels = dict.fromkeys(p.part for p in at), {p.level for p in at}
        found.append(
            TensorSensitivity(
                kind,
                name,
                tuple(dict.fromkeys(layer.name for layer, _ in calls)),
                _joint_part(list(parts)),
                levels.pop() if len(levels) == 1 else None,
                bool(at) and all(p.output for p in at),
                specs[kind, name]['bits'],
                Damage(0.0),
            )
        )
    # what the head puts out belongs where it is written
    written = {
        name: places.get((layer.name, call)) for layer in structure.layers for call, name in enumerate(layer.outputs)
    }
    for name in unread(structure):
        place = written.get(name)
        if place is None or not place.output:
            place = Place(BETWEEN)
        found.append(
            TensorSensitivity(
                ACTIVATION,
                name,
                (),
                place.part,
                place.level,
                place.output,
                structure.activations[name].spec['bits'],
                Damage(0.0),
            )
        )
    return found


def _written(structure: Structure) -> set[str]:
    """The activations that are quantized where they are computed."""
    names = {name for layer in structure.layers for name in layer.outputs}
    return names.union(*((site['activation'], site['gate']) for site in structure.sites)) - {None}


def _joint_part(parts: list[str]) -> str:
    """One name for a tensor that several parts read: that of the part if there is one, else all of them."""
    return parts[0] if len(parts) == 1 else ' + '.join(parts) or 'unknown'
