"""Batch normalisation folding: the convolution takes over the normalisation that follows it."""

from __future__ import annotations

import torch
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.watching.layers import is_transposed


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
            raise PTQError(
                f'the detector has no layer {conv_name} followed by {norm_name}; '
                'the config does not belong to this checkpoint.'
            )
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
