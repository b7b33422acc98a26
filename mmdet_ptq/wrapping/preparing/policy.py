"""From the ``ptq`` block to one policy per layer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.config import POLICY_KEYS, PTQConfig, TensorConfig, apply_policy, check_format
from mmdet_ptq.errors import PTQError, did_you_mean
from mmdet_ptq.wrapping.watching.layers import matches
from mmdet_ptq.wrapping.watching.probe import Probe, head_names, part_of


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
    runs: bool = True


def layer_roles(detector: nn.Module, probe: Probe, layers: Iterable[str]) -> list[LayerRole]:
    """Where layers stand in a detector.

    Args:
        detector: The detector.
        probe: What a pass of it showed.
        layers: Names of its layers.
    """
    heads = set(head_names(detector))
    first, runs = {call.layer for call in probe.calls if call.reads_image}, {call.layer for call in probe.calls}
    return [
        LayerRole(name, part_of(name, heads) in heads, name in first, name in probe.outputs, name in runs)
        for name in layers
    ]


def resolve_policies(cfg: PTQConfig, roles: Iterable[LayerRole]) -> dict[str, LayerPolicy]:
    """Resolves what holds for each layer.

    Later entries win: the general block, ``head``, ``first``, ``last``, then ``overrides`` in their order.

    Args:
        cfg: The validated ``ptq`` block.
        roles: The detector's layers.

    Returns:
        Layer name to policy.

    Raises:
        PTQError: An override pattern, `head`, `first` or `last` matches no layer, or its format does not exist or take
            its options.
    """
    roles = list(roles)
    names = [role.name for role in roles]
    for pattern in cfg.overrides:
        matched = [role for role in roles if matches(pattern, role.name)]
        if not matched:
            hint = _expression_hint(pattern, names) or did_you_mean(pattern, _prefixes(names))
            raise PTQError(f'`ptq.overrides[{pattern!r}]` matches no layer of this detector.{hint}')
        if not any(role.runs for role in matched):
            print_log(
                f'`ptq.overrides[{pattern!r}]` changes nothing: none of the {len(matched)} layers that it matches runs '
                f'in `predict` (first: {matched[0].name})',
                'current',
                level=logging.WARNING,
            )
    _check_roles(cfg, [role for role in roles if role.runs])
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


def _expression_hint(pattern: str, names: list[str]) -> str:
    """What to write instead of a regular expression, which mmdet's configs take elsewhere; empty where it is none."""
    try:
        meant = any(re.search(pattern, name) for name in names)
    except re.error:
        return ''
    if not meant or pattern == re.escape(pattern).replace(r'\.', '.'):
        return ''
    told = ' Patterns are those of file names, no regular expressions: * stands for anything.'
    plain = pattern.strip('^$').replace(r'\.', '.').replace('.*', '*')
    return f"{told} Did you mean '{plain}'?" if any(matches(plain, name) for name in names) else told


def _check_roles(cfg: PTQConfig, running: list[LayerRole]) -> None:
    """Refuses a policy for layers that the detector does not have; where it is the preset's own, says so."""
    preset = PTQConfig.from_dict({}, cfg.preset) if cfg.preset else PTQConfig()
    for key, attribute, what in (
        ('head', 'in_head', 'no module whose name ends with `head` and whose layers run in `predict`'),
        ('first', 'first', 'no layer that reads the image'),
        ('last', 'last', 'no layer that writes the output of a module whose name ends with `head`'),
    ):
        policy = getattr(cfg, key)
        if not policy or any(getattr(role, attribute) for role in running):
            continue
        told = f'`ptq.{key}` applies to nothing: the detector has {what}; name the layers in `ptq.overrides` instead.'
        if policy != getattr(preset, key):
            raise PTQError(told)
        print_log(told, 'current', level=logging.WARNING)


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
