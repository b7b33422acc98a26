"""Chosen formats become part of the detector, of its structure, and of the config."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from mmdet_ptq.calibration.protection.candidates import Candidate, put_in
from mmdet_ptq.calibration.protection.sensitivity import ACTIVATION, TensorSet
from mmdet_ptq.wrapping import QuantizedWeight, Structure
from mmdet_ptq.wrapping.state import STATE


def adopt(detector: nn.Module, structure: Structure, tensors: TensorSet, candidate: Candidate) -> None:
    """Gives a tensor set another format for good, as if the detector had been prepared with it.

    Args:
        detector: The quantized detector, changed in place.
        structure: Its structure, changed in place.
        tensors: Whose format.
        candidate: The format; a quantizer for activations must have its range.
    """
    if candidate.is_float:
        _leave_float(detector, structure, tensors)
        return
    put_in(detector, tensors, candidate)
    for name, quantizer in candidate.quantizers.items():
        if tensors.kind == ACTIVATION:
            entry = structure.activations[name]
            entry.spec, entry.observer = quantizer.spec(), dict(candidate.observers[name])
    if tensors.kind != ACTIVATION:
        for layer in structure.layers:
            if layer.name in candidate.quantizers:
                layer.weight = candidate.quantizers[layer.name].spec()


def _leave_float(detector: nn.Module, structure: Structure, tensors: TensorSet) -> None:
    layers = [layer for layer in structure.layers if layer.name in tensors.layers]
    if tensors.kind != ACTIVATION:
        for layer in layers:
            layer.weight = None
            # as preparing says it: what is said of the input comes last
            layer.reason = layer.reason or 'its weight is left float by the policy'
            _unquantize_weight(detector.get_submodule(layer.name))
        return
    state = getattr(detector, STATE)
    for layer in layers:
        layer.inputs = [None if name in tensors.tensors else name for name in layer.inputs]
        layer.reason = 'its input is left float by the policy'
    for hook in state.hooks:
        hook.names = [None if name in tensors.tensors else name for name in hook.names]
    for name in tensors.tensors:
        del state.activations[name], state.readers[name], structure.activations[name]


def _unquantize_weight(layer: nn.Module) -> None:
    """Takes the quantizer off a weight.

    ``parametrize.remove_parametrizations`` deletes the property from the class, which deep copies of the layer share.
    """
    steps = layer.parametrizations.weight
    if len(steps) > 1 or len(layer.parametrizations) > 1:
        # another parametrization stays
        del steps[next(i for i, step in enumerate(steps) if isinstance(step, QuantizedWeight))]
        return
    weight = steps.original
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    layer.weight = weight


def overrides_for(chosen: Mapping[TensorSet, Candidate]) -> dict[str, dict]:
    """Exact layer names to the policies that give the chosen formats."""
    overrides: dict[str, dict] = {}
    for tensors, candidate in chosen.items():
        part = 'activations' if tensors.kind == ACTIVATION else 'weights'
        for layer in tensors.layers:
            overrides.setdefault(layer, {})[part] = copy.deepcopy(candidate.change)
    return overrides
