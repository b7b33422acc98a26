"""Scale migration: channels of a layer's input are divided by factors, which its weight takes over.

SmoothQuant (Xiao et al., ICML 2023, equation 3) for convolutions: W x = (W diag(f)) (x / f). The division stands in
front of the input's quantizer, so that one scale serves channels of very different ranges; the weight with its factors
is what is quantized. Kernels see an input with one scale and a weight, as ever.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..quantizers import AffineQuantizer, build_observer, build_quantizer
from .layers import channel_axis, channel_format, in_channels, is_transposed
from .weights import float_weight, quantized_weights

# channels are divided by at most this, and at least its inverse; 4.3 and 0.17 on YOLOX-nano
MAX_FACTOR = 16.0

if TYPE_CHECKING:
    from ..config import TensorConfig
    from .inputs import QuantizationState


class ChannelDivision(nn.Module):
    """Divides the channels of a tensor by fixed factors.

    Args:
        channels: Number of channels.
        axis: Their axis.
    """

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer('factor', torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """X / factor."""
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return x / self.factor.view(shape)


@dataclass
class Migration:
    """A tensor whose scales may move into the weights of the layers that read it.

    Attributes:
        readers: Names of the layers.
        policy: The format of their input.
    """

    readers: list[str]
    policy: TensorConfig


def can_migrate(module: nn.Module, calls: int) -> bool:
    """Whether a layer's weight can take over factors of its input's channels.

    A layer that several levels share reads several tensors, each with factors of its own; groups are left out.
    """
    return calls == 1 and getattr(module, 'groups', 1) == 1


def measure_factors(detector: nn.Module, migrations: Mapping[str, Migration], run: Callable[[], Any]
                    ) -> dict[str, Tensor]:
    """Finds the factors: each channel's own scale, to the power of ``scale_migration``, around a geometric mean of 1.

    Args:
        detector: The float detector, in eval mode.
        migrations: Activation name to who reads it.
        run: Calls the detector on some calibration images.

    Returns:
        Activation name to factors, (C,).
    """
    observers, handles = {}, []
    for name, migration in migrations.items():
        layer = detector.get_submodule(migration.readers[0])
        channels = dict(num_channels=in_channels(layer), channel_axis=channel_axis(layer))
        observers[name] = build_observer({**migration.policy.observer, **channels})
        handles.append(layer.register_forward_pre_hook(_observing(observers[name]), with_kwargs=True))
    try:
        if handles:
            with torch.no_grad():
                run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: _factors(observers[name], migration) for name, migration in migrations.items()}


def _observing(observer: Any) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        observer.update((args or tuple(kwargs.values()))[0].detach())
    return hook


def _factors(observer: Any, migration: Migration) -> Tensor:
    policy = migration.policy
    channels = channel_format(policy.quantizer, observer.num_channels, observer.channel_axis)
    quantizer = build_quantizer({**policy.quantizer, 'bits': policy.bits, **channels})
    quantizer.fit_activation(observer)
    scale = quantizer.positive_scale().detach().double().cpu()
    dead = ((observer.low == 0) & (observer.high == 0)).cpu()
    if dead.all():
        return torch.ones(len(scale))
    relative = scale / scale[~dead].log().mean().exp()
    # a channel that was always zero says nothing; one that was next to nothing may awake on another image, and would
    # widen the range of all
    relative[dead] = 1
    return relative.clamp(1 / MAX_FACTOR, MAX_FACTOR).pow(policy.scale_migration).float()


def times_factor(module: nn.Module, weight: Tensor, factor: Tensor | None) -> Tensor:
    """A layer's weight with the factors of its input's channels."""
    if factor is None:
        return weight
    shape = [1] * weight.dim()
    shape[0 if is_transposed(module) else 1] = -1
    return weight * factor.to(weight).view(shape)


@torch.no_grad()
def migrate(detector: nn.Module, state: QuantizationState, factors: Mapping[str, Tensor],
            migrations: Mapping[str, Migration]) -> None:
    """Divides inputs and multiplies weights, in place; the float detector computes what it did.

    Args:
        detector: The detector with its quantizers.
        state: Its quantization state.
        factors: What :func:`measure_factors` returned.
        migrations: Activation name to who reads it.
    """
    for name, factor in factors.items():
        state.divisions[name].factor.copy_(factor)
        for reader in migrations[name].readers:
            layer = detector.get_submodule(reader)
            float_weight(layer).copy_(times_factor(layer, float_weight(layer), factor))


@torch.no_grad()
def take_back(detector: nn.Module, state: QuantizationState, name: str, readers: list[str]) -> None:
    """Undoes the migration of a tensor that is to stay float; the weights of its readers get new scales.

    Args:
        detector: The quantized detector.
        state: Its quantization state.
        name: The activation.
        readers: The layers that read it.
    """
    factor, weights = state.divisions[name].factor, quantized_weights(detector)
    del state.divisions[name]
    for reader in readers:
        layer = detector.get_submodule(reader)
        if reader in weights:
            weight = float_weight(layer)
            weight.copy_(times_factor(layer, weight, 1 / factor))
            weights[reader].quantizer.fit_weight(weights[reader].layout.to_rows(weight))
        else:
            layer.weight.copy_(times_factor(layer, layer.weight, 1 / factor))


def is_migratable(policy: TensorConfig) -> bool:
    """Whether a format wants its channels' scales in the weights."""
    quantizer = build_quantizer({**policy.quantizer, 'bits': policy.bits})
    return policy.scale_migration > 0 and isinstance(quantizer, AffineQuantizer)
