"""Named ``ptq`` blocks. ``configs/_ptq_/*.py`` give the same by relative ``_base_``."""
from __future__ import annotations

_LOG_AFFINE = dict(type='mmdet_ptq.LogAffineQuantizer', mode='log1p')
# Per layer whichever of log-affine and uniform has the least error.
_AUTO = dict(type='mmdet_ptq.LogAffineQuantizer', mode='auto')
_AFFINE = dict(type='mmdet_ptq.AffineQuantizer')

# Policies for the detection heads, by name: ptq = dict(head='float_outputs').
HEAD_POLICIES = {
    'float': dict(weights=dict(float=True), activations=dict(float=True)),
    'float_outputs': dict(last=dict(weights=dict(float=True), activations=dict(float=True))),
    'affine': dict(weights=dict(quantizer=_AFFINE)),
    'log_affine': dict(weights=dict(quantizer=_LOG_AFFINE)),
}

_EIGHT_BIT_ENDS = dict(
    first=dict(weights=dict(bits=8), activations=dict(bits=8)),
    last=dict(weights=dict(bits=8, quantizer=_AFFINE), activations=dict(bits=8)))


def _low_bit(weights: int, activations: int) -> dict:
    return dict(
        weights=dict(bits=weights), activations=dict(bits=activations),
        head=dict(weights=dict(quantizer=_AUTO)), global_loss=dict(iters=500), **_EIGHT_BIT_ENDS)


PRESETS = {
    # Everything in 8 bits, head and outputs included, then the filtered global loss.
    'w8a8': dict(weights=dict(bits=8), activations=dict(bits=8), global_loss=dict()),
    # The same from range observers alone: seconds instead of minutes.
    'w8a8_observe': dict(weights=dict(bits=8), activations=dict(bits=8)),
    'w4a8': _low_bit(4, 8),
    'w4a4': _low_bit(4, 4),
}
