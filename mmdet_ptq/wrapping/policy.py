"""From the ``ptq`` block to one policy per layer."""
from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from ..config import PTQConfig, TensorConfig, apply_policy
from ..errors import PTQError, did_you_mean


@dataclass
class LayerPolicy:
    """How one layer's weight and inputs are quantized."""

    weights: TensorConfig
    activations: TensorConfig


@dataclass
class LayerRole:
    """Where a layer stands in the detector."""

    name: str
    in_head: bool
    first: bool
    last: bool


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names the layer or one of its parents."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f'{pattern}.*')


def resolve_policies(cfg: PTQConfig, roles: Iterable[LayerRole]) -> dict[str, LayerPolicy]:
    """Resolves what holds for each layer.

    Later entries win: the general block, ``head``, ``first``, ``last``, then ``overrides`` in their order.

    Args:
        cfg: The validated ``ptq`` block.
        roles: The detector's layers.

    Returns:
        Layer name to policy.

    Raises:
        PTQError: An override pattern matches no layer.
    """
    roles = list(roles)
    names = [role.name for role in roles]
    for pattern in cfg.overrides:
        if not any(matches(pattern, name) for name in names):
            hint = did_you_mean(pattern, _prefixes(names))
            raise PTQError(f'`ptq.overrides[{pattern!r}]` matches no layer of this detector.{hint}')
    policies = {}
    for role in roles:
        policy = LayerPolicy(cfg.weights, cfg.activations)
        for key, change, applies in (
                ('ptq.head', cfg.head, role.in_head), ('ptq.first', cfg.first, role.first),
                ('ptq.last', cfg.last, role.last),
                *((f'ptq.overrides[{p!r}]', c, matches(p, role.name)) for p, c in cfg.overrides.items())):
            if applies:
                policy = _change(policy, change, key)
        policies[role.name] = policy
    return policies


def _change(policy: LayerPolicy, change: dict, key: str) -> LayerPolicy:
    parts = {
        part: apply_policy(getattr(policy, part), change[part], f'{key}.{part}')
        if part in change else getattr(policy, part) for part in ('weights', 'activations')}
    return LayerPolicy(**parts)


def _prefixes(names: list[str]) -> list[str]:
    found = set(names)
    for name in names:
        parts = name.split('.')
        found |= {'.'.join(parts[:i]) for i in range(1, len(parts))}
    return sorted(found)
