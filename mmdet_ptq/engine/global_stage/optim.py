"""One learning rate per quantization parameter, relative to its size."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import Tensor, nn

from mmdet_ptq.quantizers.base import SCALE_FLOOR
from mmdet_ptq.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmdet_ptq.wrapping.state import STATE
from mmdet_ptq.wrapping.weights import float_weight, quantized_weights


def learnable_parameters(detector: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, Tensor]]:
    """Every learnable quantization parameter of a detector, and the weights and biases of its quantized layers.

    Channels of one layer may differ by orders of magnitude, after a folded normalisation or in front of a depthwise
    convolution: each has a unit of its own.

    Args:
        detector: A quantized detector.

    Yields:
        Name, kind, parameter, and the unit in which it moves, as a tensor that broadcasts to it. Kinds are ``'scale'``
        of activations, ``'weight_scale'``, ``'mu'``, ``'s'``, ``'k'``, ``'eps'`` of weights, ``'weight'`` and
        ``'bias'``. The unit of a scale is itself, that of a weight its quantization step.
    """
    for name, quantizer in getattr(detector, STATE).activations.items():
        for kind, parameter in quantizer.learnable().items():
            yield f'{name}.{kind}', kind, parameter, parameter.detach().abs()
    for name, weight in quantized_weights(detector).items():
        layer, parameters = detector.get_submodule(name), weight.quantizer.learnable()
        for kind, parameter in parameters.items():
            # an offset moves in steps of the scale it stands beside; log k and log eps are relative already
            unit = parameters['s' if kind == 'mu' else kind].detach().abs()
            unit = torch.ones_like(unit) if kind in ('k', 'eps') else unit
            yield f'{name}.weight.{kind}', 'weight_scale' if kind == 'scale' else kind, parameter, unit
        original = float_weight(layer)
        yield f'{name}.weight', 'weight', original, weight.step_sizes(original)
        bias = getattr(layer, 'bias', None)
        if isinstance(bias, nn.Parameter):
            # as wide as the channel's weights are
            norms = weight.layout.to_rows(original.detach()).norm(dim=1)
            spread = bias.detach().abs().mean().clamp_min(1e-2)
            yield f'{name}.bias', 'bias', bias, spread * norms / norms.mean().clamp_min(SCALE_FLOOR)


def train_only_quantization(detector: nn.Module, rates: Mapping[str, float]) -> None:
    """Leaves gradients on for exactly those :func:`learnable_parameters` whose kind has a learning rate.

    Args:
        detector: A quantized detector.
        rates: Kind to learning rate.
    """
    detector.requires_grad_(False)
    for _, kind, parameter, _ in learnable_parameters(detector):
        parameter.requires_grad_(rates[kind] > 0)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class QuantizationParamsConstructor:
    """Builds the optimizer wrapper of the global stage: one parameter group per quantization parameter.

    Args:
        optim_wrapper_cfg: mmengine's optimizer wrapper config.
        paramwise_cfg: Kind of parameter to learning rate, relative to the size of the parameter.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict) -> None:
        self.cfg = dict(optim_wrapper_cfg)
        self.rates = dict(paramwise_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        module = model.module if hasattr(model, 'module') else model
        groups = []
        # the global stage's model has the detector in it, mmdet's own training trains the detector itself
        for name, kind, parameter, unit in learnable_parameters(getattr(module, 'detector', module)):
            if parameter.requires_grad:
                groups.append(dict(params=[parameter], lr=self.rates[kind], name=name, unit=unit.clone()))
        return build_wrapper(self.cfg, groups)


def build_wrapper(cfg: dict, groups: list[dict]) -> OptimWrapper:
    """Builds an optimizer and its wrapper.

    Args:
        cfg: mmengine's optimizer wrapper config; Adam in ``OptimWrapper`` where it does not say.
        groups: Parameter groups.
    """
    cfg = {'type': 'OptimWrapper', 'optimizer': {}, **cfg}
    optimizer = OPTIMIZERS.build({'type': 'Adam', **cfg.pop('optimizer'), 'params': groups})
    _step_in_units(optimizer)
    return OPTIM_WRAPPERS.build({**cfg, 'optimizer': optimizer})


def _step_in_units(optimizer: torch.optim.Optimizer) -> None:
    """Lets an optimizer see parameters in the ``unit`` of their group, whatever it is; a unit of zero holds one.

    Values are then of the order of one, and a step late in the schedule is not lost in their rounding.
    """
    held: dict[int, Tensor] = {}

    def in_units() -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        for group in optimizer.param_groups:
            # a run of before has none: its rates are products already
            for parameter in group['params'] if 'unit' in group else ():
                unit = group['unit'].to(parameter)
                yield parameter, torch.where(unit > 0, unit, 1), unit > 0

    @torch.no_grad()
    def divide(*args) -> None:
        for parameter, unit, moves in in_units():
            if not moves.all():
                held[id(parameter)] = parameter.detach().clone()
            parameter.div_(unit)

    @torch.no_grad()
    def multiply(*args) -> None:
        for parameter, unit, moves in in_units():
            parameter.mul_(unit)
            if id(parameter) in held:
                parameter.copy_(torch.where(moves, parameter, held.pop(id(parameter))))

    optimizer.register_step_pre_hook(divide)
    optimizer.register_step_post_hook(multiply)


def by_iterations(scheduler: dict) -> dict:
    """A scheduler's config, by iterations where it says nothing.

    mmengine's default, by epochs, would never take a step in a loop over iterations.
    """
    default = {} if scheduler.get('convert_to_iter_based') else dict(by_epoch=False)
    return {**default, **copy.deepcopy(scheduler)}
