"""From the ``ptq`` block to one policy per layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mmdet_ptq.config import POLICY_KEYS, PTQConfig, TensorConfig, apply_policy, check_format
from mmdet_ptq.errors import PTQError, did_you_mean
from mmdet_ptq.wrapping.watching.layers import matches


@dataclass
class LayerPolicy:
    """How one layer's weight and inputs are quantized.

    Attributes:
        weights: The weight's format.
        activations: The inputs' format.
        changed_by: ``'weights'`` / ``'activations'`` to the key of the config that changed them last, if any did.
    """

    weights: TensorConfig
    activations: TensorConfig
    changed_by: dict[str, str] = field(default_factory=dict)

    @property
    def overridden(self) -> bool:
        """Whether an override names the inputs' format, not only the layer's place in the detector."""
        return self.changed_by.get('activations', '').startswith('ptq.overrides')


@dataclass
class LayerRole:
    """Where a layer stands in the detector."""

    name: str
    in_head: bool
    first: bool
    last: bool


def resolve_policies(cfg: PTQConfig, roles: Iterable[LayerRole]) -> dict[str, LayerPolicy]:
    """Resolves what holds for each layer.

    Later entries win: the general block, ``head``, ``first``, ``last``, then ``overrides`` in their order.

    Args:
        cfg: The validated ``ptq`` block.
        roles: The detector's layers.

    Returns:
        Layer name to policy.

    Raises:
        PTQError: An override pattern matches no layer, or its format does not exist or take its options.
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
            ('ptq.head', cfg.head, role.in_head),
            ('ptq.first', cfg.first, role.first),
            ('ptq.last', cfg.last, role.last),
            *((f'ptq.overrides[{p!r}]', c, matches(p, role.name)) for p, c in cfg.overrides.items()),
        ):
            if applies:
                policy = _change(policy, change, key)
        for part, key in policy.changed_by.items():
            check_format(getattr(policy, part), part, f'{key}.{part}')
        policies[role.name] = policy
    return policies


def _change(policy: LayerPolicy, change: dict, key: str) -> LayerPolicy:
    parts = {
        part: apply_policy(getattr(policy, part), change[part], f'{key}.{part}')
        for part in POLICY_KEYS
        if part in change
    }
    return replace(policy, **parts, changed_by={**policy.changed_by, **dict.fromkeys(parts, key)})


def _prefixes(names: list[str]) -> list[str]:
    found = set(names)
    for name in names:
        parts = name.split('.')
        found |= {'.'.join(parts[:i]) for i in range(1, len(parts))}
    return sorted(found)
