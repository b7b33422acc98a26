"""A weight's quantizer, built from its policy and fitted to its values."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor

from mmdet_ptq.config import TensorConfig
from mmdet_ptq.quantizers import (
    SUM_LIMIT,
    AffineQuantizer,
    LogAffineQuantizer,
    Quantizer,
    build_observer,
    build_quantizer,
    resolve_auto,
)
from mmdet_ptq.registry import QUANTIZERS, registered

# the largest magnitude of which any two fit the sum
_SAFE = SUM_LIMIT // 2
# of uniform weights, where the config says nothing; channels are those of the output
_WEIGHT_DEFAULTS = dict(symmetric=True, channel_axis=0)


def fit_weight_quantizer(policy: TensorConfig, rows: Tensor, neighbours: Mapping[str, Any] | None) -> Quantizer:
    """Builds the quantizer a policy names and fits it to a weight.

    Args:
        policy: The ``weights`` policy of the layer. Affine weights are symmetric unless the policy says otherwise.
        rows: The weight, shape (out_channels, -1).
        neighbours: The layer's :func:`mmdet_ptq.wrapping.watching.layers.neighbours`; the bound on their sums holds
            unless the policy ignores it.

    Returns:
        The fitted quantizer, one scale per output channel.
    """
    cfg = {**policy.quantizer, 'bits': policy.bits, 'num_channels': rows.shape[0]}
    kind, bounded = registered(QUANTIZERS, cfg['type']), policy.saturation == 'safe' and neighbours is not None
    if _is(kind, AffineQuantizer):
        given = {name: value for name, value in _WEIGHT_DEFAULTS.items() if name in signature(kind).parameters}
        cfg = {**given, **cfg}
    # codes of fewer bits are within the bound as they are, unless a zero point moves them
    narrow = policy.bits < 8 and (cfg.get('symmetric', False) or not _is(kind, AffineQuantizer))
    if not bounded or narrow or policy.bits > 8:
        neighbours = None
    if bounded and _is(kind, LogAffineQuantizer) and 'table_max' in signature(kind).parameters:
        cfg = {'table_max': _SAFE, **cfg}
    if cfg.get('mode') == 'auto':
        return resolve_auto(cfg, rows, neighbours=neighbours)
    if neighbours is not None and _is(kind, AffineQuantizer) and 'neighbours' in signature(kind).parameters:
        cfg = {'neighbours': neighbours, **cfg}
    quantizer = build_quantizer(cfg).to(rows.device)
    observer = None
    # the squared error is searched on the weight itself, which is exact, instead of on a histogram of it
    if policy.observer['type'].rpartition('.')[2] != 'MSEObserver':
        observer = build_observer({**policy.observer, 'num_channels': rows.shape[0], 'channel_axis': 0})
    quantizer.fit_weight(rows, observer=observer)
    return quantizer


def _is(kind: type | None, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)
