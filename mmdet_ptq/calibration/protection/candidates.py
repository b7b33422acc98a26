"""Other formats for a tensor: built, ranged on the calibration images, and swapped in to be measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.calibration.fisher import weigh_activations
from mmdet_ptq.calibration.protection.sensitivity import ACTIVATION, WEIGHT, TensorSet
from mmdet_ptq.config import PTQConfig, TensorConfig, apply_policy
from mmdet_ptq.errors import PTQError
from mmdet_ptq.progress import track
from mmdet_ptq.quantizers import Quantizer, build_observer, build_quantizer
from mmdet_ptq.wrapping import Structure, float_weight, quantization_mode, quantized_weights
from mmdet_ptq.wrapping.preparing.fit_weight import fit_weight_quantizer
from mmdet_ptq.wrapping.preparing.policy import layer_roles, resolve_policies
from mmdet_ptq.wrapping.state import STATE
from mmdet_ptq.wrapping.watching.layers import RowLayout, channel_axis, in_channels, is_depthwise, neighbours
from mmdet_ptq.wrapping.watching.probe import probe_detector

_RANGES = {
    'FisherObserver': 'Fisher range',
    'MSEObserver': 'MSE range',
    'MinMaxObserver': 'min-max range',
    'PercentileObserver': 'percentile range',
}
_LOG = dict(type='mmdet_ptq.LogAffineQuantizer', mode='log1p')
_AFFINE = dict(type='mmdet_ptq.AffineQuantizer')
LOWER_BITS = 4


@dataclass
class Candidate:
    """One way to quantize a tensor set.

    Attributes:
        kind: Which of ``ptq.protect.candidates`` it is; ``'now'`` for what it replaces, ``'lower'`` for fewer bits.
        label: The format in words.
        change: What an override has to say, as the ``activations`` or ``weights`` entry of a policy.
        quantizers: Tensor name to its quantizer; None where it stays float.
        observers: Activation name to the observer that its range comes from.
        loss: Filtered global loss with this tensor set alone quantized so; None until it is measured.
    """

    kind: str
    label: str
    change: dict
    quantizers: dict[str, Quantizer | None]
    observers: dict[str, dict] = field(default_factory=dict)
    loss: float | None = None

    @property
    def is_float(self) -> bool:
        return None in self.quantizers.values()

    def specs(self, tensors: TensorSet) -> dict[tuple[str, str], dict | None]:
        """Its formats as :func:`mmdet_ptq.calibration.protection.budget.cost_of` takes them."""
        return {(tensors.kind, name): quantizer and quantizer.spec() for name, quantizer in self.quantizers.items()}


def weight_policies(
    detector: nn.Module, structure: Structure, cfg: PTQConfig, run: Callable[[], Any]
) -> dict[str, TensorConfig]:
    """What the config says about each layer's weight.

    Args:
        detector: The quantized detector.
        structure: Its structure.
        cfg: The ``ptq`` block it was prepared with.
        run: Calls the detector on one image with ``mode='predict'``.
    """
    with quantization_mode(detector, 'float'):
        probe = probe_detector(detector, run)
    roles = layer_roles(detector, probe, [layer.name for layer in structure.layers])
    return {name: policy.weights for name, policy in resolve_policies(cfg, roles).items()}


def candidates_for(
    detector: nn.Module,
    structure: Structure,
    tensors: TensorSet,
    kinds: Sequence[str],
    policies: dict[str, TensorConfig],
) -> list[Candidate]:
    """Builds what may replace a tensor set's format; weights are fitted, activations still need their ranges.

    Args:
        detector: The quantized detector.
        structure: Its structure.
        tensors: Whose format.
        kinds: Which candidates are wanted, of ``ptq.protect.candidates`` or ``'lower'``.
        policies: From :func:`weight_policies`.
    """
    if tensors.kind == WEIGHT:
        changes = _weight_changes(structure, tensors, policies[tensors.layers[0]])
    else:
        changes = _activation_changes(detector, structure, tensors)
    build = _weight_candidate if tensors.kind == WEIGHT else _activation_candidate
    return [build(detector, structure, tensors, policies, *change) for change in changes if change[0] in kinds]


def present(detector: nn.Module, structure: Structure, tensors: TensorSet) -> Candidate:
    """The format that a tensor set has now."""
    if tensors.kind == WEIGHT:
        quantizers = {name: quantized_weights(detector)[name].quantizer for name in tensors.tensors}
        return Candidate('now', format_label(next(iter(quantizers.values())).spec()), {}, quantizers)
    state = getattr(detector, STATE)
    quantizers = {name: state.activations[name] for name in tensors.tensors}
    observers = {name: structure.activations[name].observer for name in tensors.tensors}
    first = tensors.tensors[0]
    return Candidate('now', format_label(quantizers[first].spec(), observers[first]), {}, quantizers, observers)


def format_label(spec: dict, observer: dict | None = None) -> str:
    """A format in words, such as ``8-bit affine per channel, MSE range``."""
    style = build_quantizer(spec).style
    channels = ' per channel' if observer is not None and spec['num_channels'] else ''
    told = '' if observer is None else f', {_RANGES.get(_name(observer), _name(observer))}'
    return f'{spec["bits"]}-bit {style}{channels}{told}'


def _name(cfg: dict) -> str:
    return cfg['type'].rpartition('.')[2]


def _activation_changes(detector: nn.Module, structure: Structure, tensors: TensorSet) -> list[tuple[str, dict]]:
    entries = [structure.activations[name] for name in tensors.tensors]
    specs = [entry.spec for entry in entries]
    changes = []
    depthwise = all(is_depthwise(detector.get_submodule(name)) for name in tensors.layers)
    if depthwise and not all(spec['num_channels'] for spec in specs):
        changes.append(('per_channel', dict(depthwise_per_channel=True)))
    changes += [
        ('range', dict(observer=dict(type=f'mmdet_ptq.{kind}')))
        for kind in _RANGES
        if any(_name(entry.observer) != kind for entry in entries)
    ]
    bits = min(spec['bits'] for spec in specs)
    # weights that took over factors of the channels were quantized with them: the tensor stays in integers
    last_resort = [] if any(entry.divided for entry in entries) else [('float', dict(float=True))]
    return changes + _bit_changes(bits, 16) + last_resort


def _weight_changes(structure: Structure, tensors: TensorSet, policy: TensorConfig) -> list[tuple[str, dict]]:
    spec = next(layer.weight for layer in structure.layers if layer.name == tensors.layers[0])
    affine = build_quantizer(spec).uniform
    changes = [('format', dict(quantizer=_LOG))] if affine and spec['bits'] <= 8 else []
    if not affine:
        changes.append(('format', dict(quantizer=_AFFINE)))
    if affine and _name(policy.observer) != 'MinMaxObserver' and policy.quantizer.get('mode') != 'auto':
        changes.append(('range', dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))))
    return changes + _bit_changes(spec['bits'], 8) + [('float', dict(float=True))]


def _bit_changes(bits: int, most: int) -> list[tuple[str, dict]]:
    wanted = [('8bit', 8), ('16bit', 16)]
    changes = [(kind, dict(bits=more)) for kind, more in wanted if bits < more <= most]
    return changes + ([('lower', dict(bits=LOWER_BITS))] if bits > LOWER_BITS else [])


def _activation_candidate(
    detector: nn.Module, structure: Structure, tensors: TensorSet, policies: dict, kind: str, change: dict
) -> Candidate:
    if kind == 'float':
        return Candidate(kind, 'float', change, dict.fromkeys(tensors.tensors), {})
    layer = detector.get_submodule(tensors.layers[0])
    device = next(detector.parameters()).device
    quantizers, observers = {}, {}
    for name in tensors.tensors:
        spec, observer = dict(structure.activations[name].spec), structure.activations[name].observer
        spec['bits'] = change.get('bits', spec['bits'])
        if kind == 'per_channel':
            spec.update(num_channels=in_channels(layer), channel_axis=channel_axis(layer))
        quantizers[name] = build_quantizer(spec).to(device)
        observers[name] = change.get('observer', observer)
    return Candidate(kind, format_label(spec, observers[name]), change, quantizers, observers)


def _weight_candidate(
    detector: nn.Module, structure: Structure, tensors: TensorSet, policies: dict, kind: str, change: dict
) -> Candidate:
    name = tensors.layers[0]
    if kind == 'float':
        return Candidate(kind, 'float', change, {name: None})
    module = detector.get_submodule(name)
    policy = apply_policy(policies[name], change, f'ptq.overrides[{name!r}].weights')
    quantizer = fit_weight_quantizer(
        policy, RowLayout.of(module).to_rows(float_weight(module).detach()), neighbours(module)
    )
    told = f', {_RANGES[_name(change["observer"])]}' if 'observer' in change else ''
    return Candidate(kind, format_label(quantizer.spec()) + told, change, {name: quantizer})


@torch.no_grad()
def observe_candidates(
    detector: nn.Module, batches: Iterable[Any], candidates: Sequence[Candidate], weighed: Iterable[Any] | None = None
) -> None:
    """Sets the ranges of all candidates for activations, in one pass of the calibration images.

    Args:
        detector: The quantized detector.
        batches: The calibration batches that the detector itself was observed on.
        candidates: Candidates from :func:`candidates_for`.
        weighed: See :func:`.observe_activations`.

    Raises:
        PTQError: No batch came.
    """
    wanted: dict[str, list[tuple[str, Quantizer]]] = {}
    observers = {}
    for candidate in candidates:
        for name, observer in candidate.observers.items():
            quantizer = candidate.quantizers[name]
            cfg = {**observer, 'num_channels': quantizer.num_channels, 'channel_axis': quantizer.channel_axis}
            # formats that differ in their bits alone read the same statistics
            key = json.dumps([name, cfg], sort_keys=True)
            if key not in observers:
                observers[key] = build_observer(cfg)
            wanted.setdefault(name, []).append((key, quantizer))
    if not wanted:
        return
    state = getattr(detector, STATE)
    for name, entries in wanted.items():
        state.observers[name] = _Several([observers[key] for key in dict.fromkeys(key for key, _ in entries)])
    try:
        with quantization_mode(detector, 'observe'):
            state.only = frozenset(wanted)
            for batch in track(batches, description='observing other formats'):
                detector(**detector.data_preprocessor(batch, False), mode='predict')
        weigh_activations(detector, state.observers, batches if weighed is None else weighed)
    finally:
        state.only = None
        state.observers.clear()
    for name, entries in wanted.items():
        for key, quantizer in entries:
            try:
                quantizer.fit_activation(observers[key])
            except PTQError as error:
                raise PTQError(f'activation {name}: {error}') from error


class _Several:
    """Observers of the same tensor."""

    def __init__(self, observers: list) -> None:
        self.observers = observers

    def update(self, x: Tensor) -> None:
        for observer in self.observers:
            observer.update(x)

    @property
    def weighs(self) -> bool:
        return any(observer.weighs for observer in self.observers)

    def weigh(self, x: Tensor, weight: Tensor) -> None:
        for observer in self.observers:
            if observer.weighs:
                observer.weigh(x, weight)


def put_in(detector: nn.Module, tensors: TensorSet, candidate: Candidate) -> None:
    """Makes a candidate's quantizers those of the detector; a float candidate changes nothing."""
    if candidate.is_float:
        return
    if tensors.kind == ACTIVATION:
        getattr(detector, STATE).activations.update(candidate.quantizers)
    else:
        for name, quantizer in candidate.quantizers.items():
            quantized_weights(detector)[name].quantizer = quantizer
