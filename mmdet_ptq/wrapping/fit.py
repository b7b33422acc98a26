"""A weight's quantizer, built from its policy and fitted to its values."""
from __future__ import annotations

from torch import Tensor

from ..config import TensorConfig
from ..quantizers import Quantizer, build_observer, build_quantizer, resolve_auto


def fit_weight_quantizer(policy: TensorConfig, rows: Tensor, importance: Tensor | None = None) -> Quantizer:
    """Builds the quantizer a policy names and fits it to a weight.

    Args:
        policy: The ``weights`` policy of the layer. Affine weights are symmetric unless the policy says otherwise.
        rows: The weight, shape (out_channels, -1).
        importance: Weight of each element's squared error, broadcastable to ``rows``.

    Returns:
        The fitted quantizer, one scale per output channel.
    """
    cfg = {**policy.quantizer, 'bits': policy.bits, 'num_channels': rows.shape[0]}
    if cfg.get('mode') == 'auto':
        return resolve_auto(cfg, rows, importance)
    if cfg['type'].rpartition('.')[2] == 'AffineQuantizer':
        cfg = {'symmetric': True, 'channel_axis': 0, **cfg}
    quantizer = build_quantizer(cfg).to(rows.device)
    observer = None
    # the squared error is searched on the weight itself, which is exact, instead of on a histogram of it
    if policy.observer['type'].rpartition('.')[2] != 'MSEObserver':
        observer = build_observer({**policy.observer, 'num_channels': rows.shape[0], 'channel_axis': 0})
    quantizer.fit_weight(rows, observer=observer, importance=importance)
    return quantizer
