"""One learning rate per quantization parameter, relative to its size."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from mmdet_ptq.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmdet_ptq.wrapping.state import STATE
from mmdet_ptq.wrapping.weights import float_weight, quantized_weights

# Scales and offsets differ by orders of magnitude between layers; log k and log eps are relative already.
RELATIVE_KINDS = ('scale', 'weight_scale', 's', 'mu', 'weight', 'bias')


def learnable_parameters(detector: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, float]]:
    """Every learnable quantization parameter of a detector, and the weights and biases of its quantized layers.

    Args:
        detector: A quantized detector.

    Yields:
        Name, kind, parameter, typical size; a weight's is its quantization step. Kinds are ``'scale'`` of activations,
        ``'weight_scale'``, ``'mu'``, ``'s'``, ``'k'``, ``'eps'`` of weights, ``'weight'`` and ``'bias'``.
    """
    for name, quantizer in getattr(detector, STATE).activations.items():
        for kind, parameter in quantizer.learnable().items():
            yield f'{name}.{kind}', kind, parameter, _size(parameter)
    for name, weight in quantized_weights(detector).items():
        parameters = weight.quantizer.learnable()
        for kind, parameter in parameters.items():
            # an offset moves in steps of the scale it stands beside
            size = _size(parameters['s' if kind == 'mu' else kind])
            yield f'{name}.weight.{kind}', 'weight_scale' if kind == 'scale' else kind, parameter, size
        yield f'{name}.weight', 'weight', float_weight(detector.get_submodule(name)), weight.step_size()
        bias = getattr(detector.get_submodule(name), 'bias', None)
        if isinstance(bias, nn.Parameter):
            yield f'{name}.bias', 'bias', bias, max(_size(bias), 1e-2)


def _size(parameter: nn.Parameter) -> float:
    return float(parameter.detach().abs().mean())


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
        for name, kind, parameter, size in learnable_parameters(getattr(module, 'detector', module)):
            if not parameter.requires_grad:
                continue
            scale = size if kind in RELATIVE_KINDS else 1.0
            groups.append(dict(params=[parameter], lr=self.rates[kind] * scale, name=name))
        return build_wrapper(self.cfg, groups)


def build_wrapper(cfg: dict, groups: list[dict]) -> OptimWrapper:
    """Builds an optimizer and its wrapper.

    Args:
        cfg: mmengine's optimizer wrapper config; Adam in ``OptimWrapper`` where it does not say.
        groups: Parameter groups.
    """
    cfg = {'type': 'OptimWrapper', 'optimizer': {}, **cfg}
    optimizer = OPTIMIZERS.build({'type': 'Adam', **cfg.pop('optimizer'), 'params': groups})
    return OPTIM_WRAPPERS.build({**cfg, 'optimizer': optimizer})


def by_iterations(scheduler: dict) -> dict:
    """A scheduler's config, by iterations where it says nothing.

    mmengine's default, by epochs, would never take a step in a loop over iterations.
    """
    default = {} if scheduler.get('convert_to_iter_based') else dict(by_epoch=False)
    return {**default, **copy.deepcopy(scheduler)}
