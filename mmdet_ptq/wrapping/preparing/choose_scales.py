"""Which tensors keep a scale per channel: those where one scale costs the detections most for what it saves.

In integers between the layers a tensor has one scale. Three kinds of tensors may have better, and are slower then: the
output of a convolution in front of a function of each value that is not fused with it (SiLU, HardSwish, LeakyReLU),
which computes in float then (a pointwise convolution, a matrix product, hands it floats, and nothing is rounded
there); the input of a depthwise convolution, which is computed in float then, unless a convolution writes it and takes
the scales over; a tensor that a depthwise convolution and others read, which stays float where it is computed, so that
each reader has a quantizer of its own. A zero point for each channel is slower still: the tensor is shifted and padded
in float, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.quantizers import build_quantizer
from mmdet_ptq.wrapping.structure import ActivationStructure, Structure
from mmdet_ptq.wrapping.watching.channel_costs import BITS, ChannelCost, Weigh, channel_costs
from mmdet_ptq.wrapping.watching.layers import channel_axis, is_pointwise

# What tensors with one scale may add to the expected loss of all layer inputs, as a share of it. Chosen on calibration
# images, see docs/experiments.md.
SHARE = 0.25
# what one scale saves for each element, by kind of tensor, in units of the first: float operations of ONNX Runtime,
# see docs/experiments.md
SAVED = dict(gated=1.0, product=0.8, channels=2.4, own=2.4)


@dataclass
class Scales:
    """What was chosen.

    Attributes:
        gated: Layers whose output keeps a scale per channel in front of a function, or stays float there.
        own: Activations, inputs of depthwise convolutions, whose tensor stays float where it is computed.
    """

    gated: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)


def choose_scales(
    detector: nn.Module,
    structure: Structure,
    dataflow: str,
    weigh: Weigh,
    gated: set[str],
    own: set[str],
    alone: set[str],
) -> Scales:
    """Chooses, and gives inputs of depthwise convolutions one scale in the structure where that was chosen.

    Args:
        detector: The float detector, in eval mode.
        structure: Its structure, with inputs of depthwise convolutions per channel.
        dataflow: ``ptq.dataflow``.
        weigh: Runs the detector and tells what matters.
        gated: Layers whose output nothing but a function of each value reads.
        own: Inputs of depthwise convolutions whose tensor others read, too, and that may stay float.
        alone: Inputs of depthwise convolutions that nobody else reads, and whose scales no layer takes over.
    """
    if dataflow == 'accuracy':
        return Scales(set(gated), set(own))
    if dataflow == 'speed':
        for name, entry in structure.activations.items():
            if name in alone and _may_have_one_scale(entry):
                give_one_scale(entry)
        return Scales()
    layers = [layer.name for layer in structure.layers if layer.integer]
    inputs, outputs = channel_costs(detector, layers, gated, weigh, channel_axis)
    budget = SHARE * sum(_present(structure, name, cost) for name, cost in inputs.items())
    choices: list[tuple[str, str, ChannelCost]] = [
        ('product' if is_pointwise(detector.get_submodule(name)) else 'gated', name, cost)
        for name, cost in outputs.items()
    ]
    for name, entry in structure.activations.items():
        readers = [inputs[x.name] for x in structure.layers if name in x.inputs and x.name in inputs]
        if readers and name in own | alone and _may_have_one_scale(entry):
            choices.append(('own' if name in own else 'channels', name, readers[0]))
    return _spend(structure, choices, budget)


def _may_have_one_scale(entry: ActivationStructure) -> bool:
    """Whether an activation has scales per channel; fewer bits than 8 are too few for channels to lose any."""
    return entry.spec.get('num_channels') is not None and entry.spec['bits'] >= BITS


def _present(structure: Structure, layer: str, cost: ChannelCost) -> float:
    """The expected loss of a layer's input as it would be without anything between the layers."""
    names = next(x.inputs for x in structure.layers if x.name == layer)
    per_channel = all(structure.activations[name].spec.get('num_channels') for name in names)
    return cost.apart() if per_channel else cost.together()


def _spend(structure: Structure, choices: list[tuple[str, str, ChannelCost]], budget: float) -> Scales:
    """Gives one scale where that costs least for the time that it saves, until the budget is used up."""
    found, kept, left, one, shared = Scales(), [], budget, 0, 0
    for extra, kind, name, cost in _by_cost(choices, ChannelCost.together):
        if extra <= left:
            left -= extra
            one += 1
            if kind == 'channels':
                give_one_scale(structure.activations[name])
        else:
            kept.append((kind, name, cost))
    inputs = [choice for choice in kept if choice[0] in ('channels', 'own')]
    for extra, _, name, _ in _by_cost(inputs, ChannelCost.one_zero_point):
        if extra <= left:
            left -= extra
            shared += give_one_zero_point(structure.activations[name])
    for kind, name, _ in kept:
        if kind != 'channels':
            (found.own if kind == 'own' else found.gated).add(name)
    spent = (budget - left) / budget * SHARE if budget else 0
    print_log(
        f'{one} of {len(choices)} tensors between the layers that could have more have one scale for all channels, '
        f'{shared} one zero point; it adds {spent:.0%} to what layer inputs are expected to lose',
        'current',
    )
    return found


def _by_cost(
    choices: list[tuple[str, str, ChannelCost]], worse: Callable[[ChannelCost], float]
) -> list[tuple[float, str, str, ChannelCost]]:
    """Choices with what they would lose more than with scales and zero points per channel, or as floats.

    Those that lose least for the time that they save come first.
    """
    told = [
        (max(worse(cost) - (0.0 if kind == 'product' else cost.apart()), 0.0), kind, name, cost)
        for kind, name, cost in choices
    ]
    return sorted(told, key=lambda choice: choice[0] / (SAVED[choice[1]] * max(choice[3].elements, 1)))


def give_one_zero_point(entry: ActivationStructure) -> bool:
    """Changes an activation's format to one zero point for all channels; False where it has none."""
    if not build_quantizer(entry.spec).has_zero_point:
        return False
    entry.spec = build_quantizer({**entry.spec, 'shared_zero_point': True}).spec()
    return True


def give_one_scale(entry: ActivationStructure) -> None:
    """Changes an activation's format to one scale for the tensor, in its entry of the structure."""
    spec = {key: value for key, value in entry.spec.items() if key != 'shared_zero_point'}
    entry.spec = build_quantizer({**spec, 'num_channels': None}).spec()
