"""Float detector in, quantized detector out: probe, fold, resolve policies, build."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ptq.config import PTQConfig, TensorConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer, build_quantizer
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.names import input_name
from mmdet_ptq.wrapping.preparing.find_folds import find_folds
from mmdet_ptq.wrapping.preparing.fit_weight import fit_weight_quantizer
from mmdet_ptq.wrapping.preparing.float_outputs import FloatOutputs
from mmdet_ptq.wrapping.preparing.migration import Migration, can_migrate, measure_factors, migrate, times_factor
from mmdet_ptq.wrapping.preparing.plan_dataflow import plan_dataflow
from mmdet_ptq.wrapping.preparing.policy import LayerPolicy, layer_roles, resolve_policies
from mmdet_ptq.wrapping.state import STATE
from mmdet_ptq.wrapping.structure import (
    ActivationStructure,
    LayerStructure,
    Structure,
    apply_structure,
    disable_checkpointing,
)
from mmdet_ptq.wrapping.watching.attention import closed_attentions, open_attentions, opened_attentions
from mmdet_ptq.wrapping.watching.channel_costs import Weigh, not_weighed
from mmdet_ptq.wrapping.watching.layers import (
    QUANTIZABLE,
    RowLayout,
    channel_axis,
    in_channels,
    is_depthwise,
    kind,
    neighbours,
)
from mmdet_ptq.wrapping.watching.probe import (
    PRODUCT_OF_ACTIVATIONS,
    LayerCall,
    Probe,
    head_names,
    part_of,
    probe_detector,
)
from mmdet_ptq.wrapping.weights import quantized_weights


def prepare_detector(
    detector: nn.Module,
    cfg: PTQConfig,
    run: Callable[[], Any],
    run_many: Callable[[], Any] | None = None,
    weigh: Weigh | None = None,
) -> Structure:
    """Folds and wraps a float detector, in place; weights are fitted, activations still need their ranges.

    Args:
        detector: The float detector with its trained weights, in eval mode.
        cfg: The ``ptq`` block.
        run: Calls the detector on one image with ``mode='predict'``.
        run_many: The same on more calibration images, on which ``activations.scale_migration`` measures channels.
            Defaults to None: ``run``.
        weigh: The same, and tells which values matter, for ``dataflow='balanced'``. Defaults to None: ``run``, and all
            matter alike.

    Returns:
        The structure of the quantized detector.

    Raises:
        PTQError: A weight is not finite, a module is compiled or of TorchScript, or an override matches no layer.
    """
    check_detector(detector)
    disable_checkpointing(detector)
    before = FloatOutputs(detector, run)
    attentions = closed_attentions(detector)
    open_attentions(detector, attentions)
    probe = probe_detector(detector, run)
    if not probe.calls:
        raise PTQError('no convolution or linear layer ran in `predict`; is the model a detector?')
    # before anything is changed: an override may be refused
    layers = [name for name, module in detector.named_modules() if isinstance(module, QUANTIZABLE)]
    policies = resolve_policies(cfg, layer_roles(detector, probe, layers))
    folds, kept = find_folds(detector, probe)
    fold_norms(detector, folds)
    plan = _plan(detector, cfg, probe, policies, run_many or run)
    structure = plan.structure
    structure.norms, structure.attentions = kept, attentions
    multiplied = any(operation['reason'] == PRODUCT_OF_ACTIVATIONS for operation in structure.uncovered)
    if cfg.dataflow is not None or (multiplied and cfg.products == 'integer'):
        plan_dataflow(detector, structure, cfg, run, probe.outputs, weigh or not_weighed(run))
    apply_structure(detector, structure)  # the folds are done; the structure records them only now
    structure.folds = [list(pair) for pair in folds]
    for name, quantized in quantized_weights(detector).items():
        quantized.quantizer.load_state_dict(plan.weights[name].state_dict())
    migrate(detector, getattr(detector, STATE), plan.factors, plan.migrations)
    device = next(detector.parameters()).device
    detector.to(device)
    before.check(detector, folds)
    return structure


def check_detector(detector: nn.Module) -> None:
    """Refuses what cannot be quantized, naming the first: weights that are not finite, layers nobody can replace."""
    for name, tensor in detector.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PTQError(
                f'the weight {name} holds NaN or infinity; the checkpoint is damaged, train or load it again.'
            )
    for name, module in detector.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PTQError(
                f'{name or "the detector"} is a TorchScript module, whose layers cannot be replaced; '
                'build it as a Python module.'
            )
        if '_orig_mod' in module._modules or module._compiled_call_impl is not None:
            raise PTQError(
                f'{name or "the detector"} is compiled (`torch.compile`), so its layers cannot be watched; '
                'compile after quantization, not before.'
            )


@dataclass
class _Plan:
    """What is about to be done to a float detector.

    Attributes:
        structure: The structure of the quantized detector.
        weights: Layer name to its fitted weight quantizer.
        factors: Activation name to what its channels are divided by.
        migrations: Activation name to who takes the factors over.
    """

    structure: Structure
    weights: dict[str, nn.Module]
    factors: dict[str, Tensor]
    migrations: dict[str, Migration]


def _plan(
    detector: nn.Module, cfg: PTQConfig, probe: Probe, policies: dict[str, LayerPolicy], run_many: Callable[[], Any]
) -> _Plan:
    calls = defaultdict(list)
    for call in probe.calls:
        calls[call.layer].append(call)
    layers = {n: m for n, m in detector.named_modules() if isinstance(m, QUANTIZABLE)}
    heads = head_names(detector)
    structure = Structure(uncovered=[vars(u) for u in probe.uncovered])
    for name, module in layers.items():
        layer = LayerStructure(
            name, kind(module), part_of(name, heads), sum(c.macs for c in calls[name]), module.weight.numel()
        )
        layer.reason = _obstacle(name, module, calls[name], probe)
        structure.layers.append(layer)
        if layer.reason:
            continue
        layer.reason = _left_float(policies[name])
        layer.inputs = [None] * len(calls[name])
    migrations = _share_inputs(structure, layers, policies, probe.calls)
    factors = measure_factors(detector, migrations, cfg.activations, run_many)
    taken = {reader: factors[name] for name, migration in migrations.items() for reader in migration.readers}
    fitted = {}
    for layer in structure.layers:
        if layer.inputs and not policies[layer.name].weights.float:
            fitted[layer.name] = _fit(
                layer.name, layers[layer.name], policies[layer.name].weights, taken.get(layer.name)
            )
            layer.weight = fitted[layer.name].spec()
        if not layer.integer:
            print_log(f'{layer.name} ({layer.kind}) is not in integers: {layer.reason}', 'current')
    if migrations:
        print_log(
            f'the scales of the channels of {len(migrations)} tensors are moved into the weights of '
            f'{len(taken)} layers',
            'current',
        )
    return _Plan(structure, fitted, factors, migrations)


def planned_layers(detector: nn.Module, cfg: PTQConfig, run: Callable[[], Any]) -> dict[str, str]:
    """What :func:`prepare_detector` would quantize, found by one pass that changes nothing.

    Args:
        detector: The float detector, in eval mode.
        cfg: The ``ptq`` block.
        run: Calls the detector on one image with ``mode='predict'``.

    Returns:
        Every convolution and linear layer to why it will stay float; '' where it will not.

    Raises:
        PTQError: An override matches no layer.
    """
    disable_checkpointing(detector)
    with opened_attentions(detector):
        return _planned(detector, cfg, run)


def _planned(detector: nn.Module, cfg: PTQConfig, run: Callable[[], Any]) -> dict[str, str]:
    probe = probe_detector(detector, run)
    layers = {name: module for name, module in detector.named_modules() if isinstance(module, QUANTIZABLE)}
    policies = resolve_policies(cfg, layer_roles(detector, probe, list(layers)))
    calls = defaultdict(list)
    for call in probe.calls:
        calls[call.layer].append(call)
    return {
        name: _obstacle(name, module, calls[name], probe) or _left_float(policies[name])
        for name, module in layers.items()
    }


def _left_float(policy: LayerPolicy) -> str:
    if policy.activations.float:
        return 'its input is left float by the policy'
    return 'its weight is left float by the policy' if policy.weights.float else ''


def _obstacle(name: str, module: nn.Module, calls: list[LayerCall], probe: Probe) -> str:
    if not calls:
        return 'it never runs in `predict`'
    if 'weight' not in module._parameters:
        return 'its weight is computed from others before each pass (pruning, weight or spectral norm)'
    if name not in probe.direct:
        return 'its weight is transformed inside the forward pass'
    return ''


def _fit(name: str, module: nn.Module, policy: TensorConfig, factor: Tensor | None) -> nn.Module:
    rows = RowLayout.of(module).to_rows(times_factor(module, module.weight.detach(), factor))
    try:
        return fit_weight_quantizer(policy, rows, neighbours(module))
    except PTQError as error:
        raise PTQError(f'weight of layer {name}: {error}') from error


def _policy_of_readers(readers: list[tuple[str, LayerPolicy]]) -> TensorConfig:
    """The format of a tensor: the widest that a reader asks for, among these one that an override names."""
    winner, policy = max(readers, key=lambda reader: (reader[1].activations.bits, reader[1].overridden))
    others = [name for name, other in readers if other.overridden and other.activations != policy.activations]
    if others:
        print_log(
            f'the input of {winner} has the format that holds there; {", ".join(dict.fromkeys(others))} would '
            'have it otherwise, but one tensor has one quantizer',
            'current',
            level=logging.WARNING,
        )
    return policy.activations


def _share_inputs(
    structure: Structure, layers: dict[str, nn.Module], policies: dict[str, LayerPolicy], calls: list[LayerCall]
) -> dict[str, Migration]:
    """Gives every tensor that quantized layers read one quantizer.

    Returns:
        The tensors whose channels' scales move into weights, by activation name.
    """
    migrations = {}
    owners = Counter(id(module.weight) for module in layers.values())  # modules may share a parameter
    by_name = {layer.name: layer for layer in structure.layers}
    groups: dict[tuple, list[LayerCall]] = defaultdict(list)
    for call in calls:
        layer = by_name[call.layer]
        if layer.inputs and not policies[call.layer].activations.float:
            own = policies[call.layer].activations.depthwise_per_channel and is_depthwise(layers[call.layer])
            groups[call.input_key, own].append(call)
    for readers in groups.values():
        policy = _policy_of_readers([(c.layer, policies[c.layer]) for c in readers])
        first = readers[0]
        name = input_name(first.layer, first.index if len(by_name[first.layer].inputs) > 1 else None)
        per_channel = policy.depthwise_per_channel and all(is_depthwise(layers[c.layer]) for c in readers)
        axis = channel_axis(layers[first.layer])
        channels = dict(num_channels=in_channels(layers[first.layer]) if per_channel else None, channel_axis=axis)
        quantizer = build_quantizer({**policy.quantizer, 'bits': policy.bits, **channels})
        structure.activations[name] = ActivationStructure(quantizer.spec(), len(readers), policy.observer)
        names = list(dict.fromkeys(call.layer for call in readers))
        strength = min(policies[n].activations.scale_migration for n in names)
        if (
            strength
            and not per_channel
            and isinstance(quantizer, AffineQuantizer)
            and all(can_migrate(layers[n], len(by_name[n].inputs)) and owners[id(layers[n].weight)] == 1 for n in names)
        ):
            structure.activations[name].divided = dict(channels=in_channels(layers[first.layer]), axis=axis)
            migrations[name] = Migration(names, strength)
        for call in readers:
            by_name[call.layer].inputs[call.index] = name
    return migrations
