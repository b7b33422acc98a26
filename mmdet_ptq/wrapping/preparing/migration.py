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
from torch.nn.utils.parametrize import is_parametrized

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import build_observer, build_quantizer
from mmdet_ptq.wrapping.watching.layers import channel_axis, channel_format, in_channels, is_plain, is_transposed
from mmdet_ptq.wrapping.weights import float_weight

# channels are divided by at most this, and at least its inverse; 4.3 and 0.17 on YOLOX-nano
MAX_FACTOR = 16.0

if TYPE_CHECKING:
    from mmdet_ptq.config import TensorConfig
    from mmdet_ptq.wrapping.state import QuantizationState


@dataclass
class Migration:
    """A tensor whose scales move into the weights of the layers that read it.

    Attributes:
        readers: Names of the layers.
        strength: How much of the differences between its channels moves, 0 to 1.
    """

    readers: list[str]
    strength: float


def can_migrate(module: nn.Module, calls: int) -> bool:
    """Whether a layer's weight can take over factors of its input's channels.

    A layer that several levels share reads several tensors, each with factors of its own; groups are left out, and so
    are layers that may do more to their input than to multiply it.
    """
    return calls == 1 and is_plain(module) and getattr(module, 'groups', 1) == 1


def measure_factors(
    detector: nn.Module, migrations: Mapping[str, Migration], policy: TensorConfig, run: Callable[[], Any]
) -> dict[str, Tensor]:
    """Finds the factors: each channel's own scale, to the power of the strength, around a geometric mean of 1.

    Args:
        detector: The float detector, in eval mode.
        migrations: Activation name to who reads it.
        policy: The format whose scales are meant, one for all tensors: a single tensor that gets another one keeps its
            factors.
        run: Calls the detector on some calibration images.

    Returns:
        Activation name to factors, (C,).

    Raises:
        PTQError: A tensor is not finite; names the layer that reads it.
    """
    observers, handles = {}, []
    for name, migration in migrations.items():
        layer = detector.get_submodule(migration.readers[0])
        channels = dict(num_channels=in_channels(layer), channel_axis=channel_axis(layer))
        observers[name] = build_observer({**policy.observer, **channels})
        handles.append(
            layer.register_forward_pre_hook(_observing(observers[name], migration.readers[0]), with_kwargs=True)
        )
    try:
        if handles:
            with torch.no_grad():
                run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: factors_of(observers[name], policy, migration.strength) for name, migration in migrations.items()}


def _observing(observer: Any, layer: str) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        try:
            observer.update((args or tuple(kwargs.values()))[0].detach())
        except PTQError as error:
            raise PTQError(f'input of layer {layer}: {error}') from error

    return hook


def factors_of(observer: Any, policy: TensorConfig, strength: float) -> Tensor:
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
    return relative.clamp(1 / MAX_FACTOR, MAX_FACTOR).pow(strength).float()


def times_factor(module: nn.Module, weight: Tensor, factor: Tensor | None) -> Tensor:
    """A layer's weight with the factors of its input's channels."""
    if factor is None:
        return weight
    shape = [1] * weight.dim()
    shape[0 if is_transposed(module) else 1] = -1
    return weight * factor.to(weight).view(shape)


@torch.no_grad()
def migrate(
    detector: nn.Module, state: QuantizationState, factors: Mapping[str, Tensor], migrations: Mapping[str, Migration]
) -> None:
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
            weight = float_weight(layer) if is_parametrized(layer, 'weight') else layer.weight
            weight.copy_(times_factor(layer, weight, factor))
