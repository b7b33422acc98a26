"""What every number format offers: a tensor in, integer codes and a simulated tensor out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.registry import QUANTIZERS, SCOPE

# scales below this are treated as this: small enough for any trained layer, large enough that 1 / scale is finite
SCALE_FLOOR = 2.0**-40


class Quantizer(nn.Module):
    """A number format for one tensor; subclasses give the codes, the values and the gradients.

    All state is in ``state_dict`` with shapes fixed by ``spec``, so that
    ``build_quantizer(q.spec()).load_state_dict(q.state_dict())`` reproduces a quantizer.

    Args:
        bits: Bits of a stored code.
        num_channels: Channels with their own parameters; None for one set per tensor. Defaults to None.
        channel_axis: Axis of the input that holds the channels: 0 for weights, 1 for NCHW activations, -1 for
            inputs of linear layers. Defaults to 0.
    """

    def __init__(self, bits: int, num_channels: int | None = None, channel_axis: int = 0) -> None:
        super().__init__()
        if num_channels is not None and (isinstance(num_channels, bool) or int(num_channels) < 1):
            raise PTQError(f'`num_channels` must be a positive integer or None, got {num_channels!r}.')
        self.bits = int(bits)
        self.num_channels = None if num_channels is None else int(num_channels)
        self.channel_axis = int(channel_axis)

    # how tables call the format
    style = 'own format'
    # whether its values are multiples of one scale, or one per channel
    uniform = False

    @property
    def has_zero_point(self) -> bool:
        """Whether the code of zero may be another than 0."""
        return False

    @classmethod
    def type_name(cls) -> str:
        """The name by which the class is registered, with its scope."""
        name = next((name for name, kind in QUANTIZERS.module_dict.items() if kind is cls), cls.__name__)
        return f'{SCOPE}.{name}'

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code that ``encode`` returns."""
        raise NotImplementedError

    @property
    def param_shape(self) -> tuple[int, ...]:
        """Shape of a parameter that is kept per channel: ``()`` or ``(num_channels,)``."""
        return () if self.num_channels is None else (self.num_channels,)

    def encode(self, x: Tensor, rounding: Tensor | None = None) -> Tensor:
        """Integer codes of ``x`` (torch.int32, same shape, no gradient)."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """The values that ``codes`` stand for: bit for bit what ``forward`` returns in float32."""
        raise NotImplementedError

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """What each value is rounded to by itself, of the shape of ``x``, whatever its neighbours in a weight are."""
        return self(x)

    def code_position(self, x: Tensor) -> Tensor:
        """Where ``x`` lies on the axis of codes, not rounded: learned rounding chooses floor(position) or the next."""
        raise NotImplementedError

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Makes the grid wider by a factor, of shape () or one per channel."""
        self.any_param().mul_(factor.to(self.any_param()))

    def step_size(self) -> float:
        """Typical distance of neighbouring values, averaged over channels."""
        raise NotImplementedError

    def step_sizes(self) -> Tensor:
        """The same of each channel, of shape ``param_shape``: the units of a weight's learning rate."""
        return self.any_param().new_full(self.param_shape, self.step_size())

    def inside_bin(self, codes: Tensor) -> Tensor:
        """A value that is rounded to each code: what the code stands for, wherever that quantizes to itself."""
        return self.decode(codes)

    def fit_weight(self, weight: Tensor, observer: Any = None, importance: Tensor | None = None) -> None:
        """Sets the parameters from a weight of shape (C, ...)."""
        raise NotImplementedError

    def learnable(self) -> dict[str, nn.Parameter]:
        """The quantization parameters to train, by kind."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """Plain arguments from which ``build_quantizer`` builds the same structure."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ', '.join(f'{k}={v}' for k, v in self.spec().items() if k != 'type')

    def per_channel(self, param: Tensor, x: Tensor) -> Tensor:
        """Views a per-channel parameter so that it broadcasts against ``x``."""
        if self.num_channels is None:
            return param
        axis = self.channel_axis
        if not -x.dim() <= axis < x.dim() or x.shape[axis] != self.num_channels:
            raise PTQError(
                f'The quantizer holds {self.num_channels} channels on axis {axis}, '
                f'but the tensor has shape {tuple(x.shape)}.'
            )
        shape = [1] * x.dim()
        shape[axis] = self.num_channels
        return param.view(shape)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A weight as float32 (C, K) matrix, one row per set of parameters."""
        weight = weight.detach().float()
        if self.num_channels is None:
            return weight.reshape(1, -1)
        self.per_channel(self.any_param(), weight)
        return weight.movedim(self.channel_axis, 0).reshape(self.num_channels, -1)

    def any_param(self) -> Tensor:
        """A tensor of ``param_shape``, used to check shapes and to place results."""
        raise NotImplementedError

    def importance_matrix(self, importance: Tensor | None, weight: Tensor) -> Tensor | None:
        """Importance broadcast to the weight, as the matrix of ``as_matrix``."""
        if importance is None:
            return None
        check_finite(importance, 'importance')
        try:
            full = importance.detach().float().expand_as(weight)
        except RuntimeError:
            raise PTQError(
                f'`importance` of shape {tuple(importance.shape)} does not broadcast to the weight of '
                f'shape {tuple(weight.shape)}.'
            ) from None
        return self.as_matrix(full)


def check_finite(x: Tensor, what: str) -> None:
    """Raises ``PTQError`` if ``x`` holds NaN or infinity, or nothing at all."""
    if x.numel() == 0:
        raise PTQError(f'The {what} to quantize is empty (shape {tuple(x.shape)}).')
    # one pass without a temporary: NaN and infinity both reach the extremes
    low, high = torch.aminmax(x.detach())
    if not (torch.isfinite(low) & torch.isfinite(high)):
        raise PTQError(f'The {what} to quantize holds NaN or infinity (non-finite {what}).')


def check_bits(bits: Any, allowed: tuple[int, ...], told: str) -> None:
    """Raises ``PTQError`` unless ``bits`` is one of ``allowed``, told in words."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in allowed:
        raise PTQError(f'`bits` must be one of {told}, got {bits!r}.')
