"""Batch normalisation folding: the convolution takes over the normalisation that follows it."""
from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn

from ..errors import PTQError
from .layers import is_transposed
from .probe import Probe


def find_folds(detector: nn.Module, probe: Probe) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Chooses which normalisations can be folded.

    A pair is folded when the convolution feeds this normalisation in every call, nothing else reads it, and the
    convolution computes with its own weight as it is stored. A convolution shared by several normalisations (RTMDet's
    SepBN head, NAS-FPN, FPG) keeps them: folding would need one weight per normalisation. So does one that standardises
    its weight (DetectoRS): the folded gain would be normalised away.

    Args:
        detector: The float detector, in eval mode.
        probe: What a pass of the detector showed.

    Returns:
        The (convolution, normalisation) names to fold, and the normalisations that stay with the reason for each.
    """
    norms_of, convs_of = defaultdict(set), defaultdict(set)
    for conv, norm in probe.norms:
        norms_of[conv].add(norm)
        convs_of[norm].add(conv)
    modules, owners = dict(detector.named_modules()), _owners(detector)
    folds, kept = [], {}
    for name, module in modules.items():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if len(convs_of[name]) != 1:
            kept[name] = 'no single convolution feeds it, and nothing else'
            continue
        conv = next(iter(convs_of[name]))
        weight = modules[conv]._parameters.get('weight')
        if len(norms_of[conv]) != 1:
            kept[name] = f'its convolution {conv} is shared by several normalisations'
        elif module.running_mean is None:
            kept[name] = 'it has no running statistics'
        elif conv not in probe.direct or weight is None:
            kept[name] = f'its convolution {conv} transforms its weight in the forward pass'
        elif owners[id(weight)] > 1 or id(weight) in probe.borrowed:
            kept[name] = f'something else reads the weight of its convolution {conv}'
        else:
            folds.append((conv, name))
    return folds, kept


def _owners(detector: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(parameter) for module in detector.modules() for parameter in module._parameters.values())


def fold_norms(detector: nn.Module, folds: list[tuple[str, str]]) -> None:
    """Folds normalisations into their convolutions, in place; the normalisation becomes an identity.

    Computed in float64, so the float outputs stay the same to rounding.

    Args:
        detector: The float detector.
        folds: (convolution, normalisation) names.

    Raises:
        PTQError: A pair names a module that the detector does not have.
    """
    modules = dict(detector.named_modules())
    for conv_name, norm_name in folds:
        if conv_name not in modules or norm_name not in modules:
            raise PTQError(f'the detector has no layer {conv_name} followed by {norm_name}; '
                           'the config does not belong to this checkpoint.')
        _fold(modules[conv_name], modules[norm_name])
        identity = nn.Identity()
        # the same module object may be reachable under several names
        for module in modules.values():
            for child_name, child in list(module._modules.items()):
                if child is modules[norm_name]:
                    module._modules[child_name] = identity


@torch.no_grad()
def _fold(conv: nn.Module, norm: nn.Module) -> None:
    spread = torch.rsqrt(norm.running_var.double() + norm.eps)
    gain = spread if norm.weight is None else norm.weight.double() * spread
    shift = -norm.running_mean.double() * gain
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = conv.weight.double()
    if is_transposed(conv):
        shape = (conv.groups, 1, conv.out_channels // conv.groups, *[1] * (weight.ndim - 2))
        rows = weight.reshape(conv.groups, -1, *weight.shape[1:])
        folded = (rows * gain.reshape(shape)).reshape(weight.shape)
    else:
        folded = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
    if conv.bias is not None:
        shift = shift + conv.bias.double() * gain
    conv.weight.copy_(folded)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
