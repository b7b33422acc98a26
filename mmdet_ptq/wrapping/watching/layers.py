"""Which modules are quantized, and how their weight becomes a matrix with one row per output channel."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mmdet_ptq.quantizers.selection import build_quantizer

QUANTIZABLE = (_ConvNd, nn.Linear)
# where forwards are defined that return what the convolution, or the normalisation, of their torch base returns;
# mmcv's differ for empty tensors and in the padding
_PLAIN_FORWARDS = frozenset(
    {
        'torch.nn.modules.conv',
        'torch.nn.modules.linear',
        'torch.nn.modules.batchnorm',
        'mmcv.cnn.bricks.wrappers',
        'mmcv.cnn.bricks.conv2d_adaptive_padding',
    }
)


def is_plain(module: nn.Module) -> bool:
    """Whether a layer or normalisation returns what its torch base class would: nothing scales or activates besides."""
    methods = [getattr(module, name) for name in ('forward', '_conv_forward') if hasattr(module, name)]
    return all(method.__module__ in _PLAIN_FORWARDS for method in methods) and not (
        module._forward_hooks or module._forward_pre_hooks
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out / groups, ...)."""
    return isinstance(module, _ConvTransposeNd)


def is_depthwise(module: nn.Module) -> bool:
    """Whether every output channel reads exactly one input channel."""
    return isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels


def is_pointwise(module: nn.Module) -> bool:
    """Whether a layer is a matrix product of all channels of each place, whose kernel may end in float."""
    if isinstance(module, nn.Linear):
        return True
    plain = (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and not any(size != 1 for size in (*module.kernel_size, *module.stride))
    )
    return plain and module.padding in ((0, 0), 'valid')


def out_channels(module: nn.Module) -> int:
    """Number of output channels of a convolution or linear layer."""
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def add_bias(module: nn.Module) -> None:
    """Gives a layer without bias one of zeros."""
    module.bias = nn.Parameter(module.weight.detach().new_zeros(out_channels(module)))


def in_channels(module: nn.Module) -> int:
    """Number of input channels of a convolution or linear layer."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def channel_axis(module: nn.Module) -> int:
    """The axis of a layer's input that holds the channels."""
    return -1 if isinstance(module, nn.Linear) else 1


def channel_format(quantizer: Mapping[str, Any], channels: int, axis: int) -> dict[str, Any]:
    """What turns the format of a layer's output into one with a scale per channel.

    The layer absorbs the scales, and the zero point is one for all, as kernels write it.

    Args:
        quantizer: The format, a registry dict.
        channels: Number of channels.
        axis: Their axis.
    """
    shared = build_quantizer(quantizer).has_zero_point
    return dict(num_channels=channels, channel_axis=axis, **(dict(shared_zero_point=True) if shared else {}))


# input channels of a layer that reads four slices of an image (YOLOX's Focus), of one colour or three
_SLICED = {4: 4, 12: 4}


def neighbours(module: nn.Module) -> dict[str, Any] | None:
    """Which weights of a layer integer kernels multiply side by side.

    Returns:
        Arguments of :class:`mmdet_ptq.quantizers.saturation.Neighbours`; None for depthwise convolutions, whose kernels
        add every product in 32 bits.
    """
    if is_depthwise(module) and module.out_channels == module.in_channels:
        return None
    groups, kernel = getattr(module, 'groups', 1), list(getattr(module, 'kernel_size', ()))
    may_be = groups == 1 and len(kernel) == 2 and not is_transposed(module)
    slices = _SLICED.get(in_channels(module), 1) if may_be else 1
    return dict(channels=in_channels(module) // groups, kernel=kernel, slices=slices)


def kind(module: nn.Module) -> str:
    """The layer's kind, as it stands in the coverage table."""
    if isinstance(module, nn.Linear):
        return 'linear'
    if is_transposed(module):
        return 'transposed convolution'
    return 'depthwise convolution' if is_depthwise(module) else 'convolution'


@dataclass(frozen=True)
class RowLayout:
    """How a weight in torch's layout becomes a matrix (out_channels, -1), and back.

    Args:
        transposed: The weight is stored as (in, out / groups, ...).
        groups: Groups of the convolution; 1 for a linear layer.
    """

    transposed: bool = False
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> RowLayout:
        """The layout of a layer's weight."""
        return cls(is_transposed(module), getattr(module, 'groups', 1))

    def to_rows(self, weight: Tensor) -> Tensor:
        """Views a weight as (out_channels, -1), which is what every weight quantizer works on."""
        if not self.transposed:
            return weight.flatten(1)
        rows = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return rows.transpose(1, 2).reshape(self.groups * weight.shape[1], -1)

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of :meth:`to_rows` for a weight of the given shape."""
        if not self.transposed:
            return rows.reshape(shape)
        weight = rows.reshape(self.groups, shape[1], shape[0] // self.groups, -1).transpose(1, 2)
        return weight.reshape(shape)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names the layer or one of its parents."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f'{pattern}.*')
