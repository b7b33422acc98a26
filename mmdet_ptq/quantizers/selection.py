"""Building quantizers and observers from plain descriptions, and choosing between formats by their error."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor

from mmdet_ptq.errors import PTQError, did_you_mean
from mmdet_ptq.quantizers.base import Quantizer
from mmdet_ptq.registry import OBSERVERS, QUANTIZERS, registered


def _build(registry: Registry, cfg: Mapping[str, Any], what: str) -> Any:
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get('type'), (str, type)):
        raise PTQError(f'A {what} must be a dict with a `type`, got {cfg!r}.')
    kwargs = dict(cfg)
    kind = kwargs.pop('type')
    cls = kind if isinstance(kind, type) else registered(registry, kind)
    if cls is None:
        known = sorted(registry.module_dict)
        raise PTQError(
            f"Unknown {what} type '{kind}', known are {', '.join(known)}."
            f'{did_you_mean(str(kind).split(".")[-1], known)}'
        )
    accepted = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for key in kwargs:
            if key not in accepted:
                raise PTQError(f"{cls.__name__} has no option '{key}'.{did_you_mean(key, accepted)}")
    for key, value in kwargs.items():
        # anything has a truth value: 'False' would be taken for True
        if key in accepted and accepted[key].annotation in (bool, 'bool') and not isinstance(value, bool):
            raise PTQError(f'`{key}` must be True or False, got {value!r:.100}.')
    try:
        return cls(**kwargs)
    except (TypeError, ValueError) as error:
        raise PTQError(f'{cls.__name__} cannot be built from {kwargs!r}: {error}.') from error


def build_quantizer(spec: Mapping[str, Any]) -> Quantizer:
    """Builds a quantizer from its ``spec`` or from a config dict.

    Args:
        spec: ``type`` (with or without the scope ``mmdet_ptq.``) and the arguments.

    Returns:
        A quantizer with the structure of the one that gave the spec, its parameters not yet set.

    Raises:
        PTQError: If the type or an argument is unknown or invalid.
    """
    return _build(QUANTIZERS, spec, 'quantizer')


def build_observer(cfg: Mapping[str, Any]) -> Any:
    """Builds an observer from a config dict, with the errors of ``build_quantizer``."""
    return _build(OBSERVERS, cfg, 'observer')


@torch.no_grad()
def weight_error(quantizer: Quantizer, weight: Tensor, importance: Tensor | None = None) -> float:
    """(Importance-weighted) sum of squared differences between a weight and its quantized values."""
    error = (quantizer(weight) - weight).double().square_()
    return float((error if importance is None else error * importance).sum())


def fit_best(candidates: list[Quantizer], weight: Tensor, importance: Tensor | None = None) -> Quantizer:
    """Fits every candidate to a weight and returns the one with the least error; the first wins a tie.

    Args:
        candidates: Quantizers for the weight, fitted in place.
        weight: Weight of shape (C, ...).
        importance: Factor of the squared error, broadcastable to ``weight``. Defaults to None.

    Returns:
        The chosen candidate.

    Raises:
        PTQError: If there is no candidate, or the weight holds NaN or infinity.
    """
    if not candidates:
        raise PTQError('`fit_best` needs at least one candidate quantizer.')
    errors = []
    for candidate in candidates:
        candidate.fit_weight(weight, importance=importance)
        errors.append(weight_error(candidate, weight, importance))
    return candidates[errors.index(min(errors))]


def resolve_auto(
    cfg: Mapping[str, Any],
    weight: Tensor,
    importance: Tensor | None = None,
    neighbours: Mapping[str, Any] | None = None,
) -> Quantizer:
    """Resolves ``LogAffineQuantizer(mode='auto')`` for one layer.

    Args:
        cfg: Config or spec of the quantizer, with ``mode='auto'``.
        weight: Weight of shape (C, ...).
        importance: Factor of the squared error, broadcastable to ``weight``. Defaults to None.
        neighbours: The uniform one's, see :class:`AffineQuantizer`. Defaults to None.

    Returns:
        A fitted symmetric ``AffineQuantizer`` or a fitted 'log1p' ``LogAffineQuantizer``, whichever has the
        least error; the uniform one, which is simpler, wins a tie.

    Raises:
        PTQError: If ``cfg`` is not a log-affine quantizer in mode 'auto'.
    """
    auto = build_quantizer(cfg)
    if getattr(auto, 'mode', None) != 'auto':
        raise PTQError(f"`resolve_auto` needs a quantizer with `mode='auto'`, got {dict(cfg)!r}.")
    spec = auto.spec()
    uniform = dict(
        type='mmdet_ptq.AffineQuantizer',
        bits=spec['bits'],
        symmetric=True,
        num_channels=spec['num_channels'],
        channel_axis=0,
        learn_scale=spec['learn'],
        neighbours=neighbours,
    )
    candidates = [build_quantizer(uniform), build_quantizer({**spec, 'mode': 'log1p'})]
    return fit_best([c.to(weight.device) for c in candidates], weight, importance)
