"""Named ``ptq`` blocks. ``configs/_ptq_/*.py`` give the same by relative ``_base_``."""

from __future__ import annotations

_LOG_AFFINE = dict(type='mmdet_ptq.LogAffineQuantizer', mode='log1p')
# Per layer whichever of log-affine and uniform has the least error.
_AUTO = dict(type='mmdet_ptq.LogAffineQuantizer', mode='auto')
_AFFINE = dict(type='mmdet_ptq.AffineQuantizer')
_MSE = dict(type='mmdet_ptq.MSEObserver')

# Policies for the detection heads, by name: ptq = dict(head='float_outputs').
HEAD_POLICIES = {
    'float': dict(weights=dict(float=True), activations=dict(float=True)),
    'float_outputs': dict(last=dict(weights=dict(float=True), activations=dict(float=True))),
    'affine': dict(weights=dict(quantizer=_AFFINE)),
    'log_affine': dict(weights=dict(quantizer=_LOG_AFFINE)),
}

_PLAIN = dict(
    search_scales=False, compensate=False, fisher=0, iters=20000, rounding='adaround', skip_below=0, rounding_lr=1e-3
)

# Published ways to reconstruct, by name: ptq = dict(reconstruct='qdrop'). The settings are those of the public codes;
# docs/method.md lists what differs.
RECONSTRUCTION_METHODS = {
    # the defaults, by a name that a command line takes
    'closed_form': dict(),
    # Nagel et al., ICML 2020: layer by layer, scales fixed.
    'adaround': dict(_PLAIN, granularity='layer', activation_lr=0),
    # Li et al., ICLR 2021: block by block, squared errors weighted by the Fisher information.
    'brecq': dict(_PLAIN, granularity='block', fisher=1),
    # Wei et al., ICLR 2022: block by block, half of the activations stay float at random.
    'qdrop': dict(_PLAIN, granularity='block', drop=0.5, input_drop=0.5),
}

_EIGHT_BIT_ENDS = dict(
    first=dict(weights=dict(bits=8, quantizer=_AFFINE), activations=dict(bits=8, scale_migration=0)),
    last=dict(weights=dict(bits=8, quantizer=_AFFINE), activations=dict(bits=8, scale_migration=0)),
)


def _low_bit(weights: int, activations: int) -> dict:
    # with few levels FisherObserver's ranges are worse to start from, and longer training pays
    start = {} if activations >= 8 else dict(scale_migration=1.0, observer=_MSE)
    training = (
        dict(iters=200, augment=2, lr=1e-4, weight_lr=1e-3)
        if activations >= 8
        else dict(iters=1000, val_interval=100, augment=8, lr=3e-4, weight_lr=1e-2, bias_lr=3e-3)
    )
    return dict(
        weights=dict(bits=weights, quantizer=_AUTO),
        activations=dict(bits=activations, **start),
        reconstruct=dict(),
        global_loss=dict(**training, weight_scale_lr=0, grid_lr=0),
        **_EIGHT_BIT_ENDS,
    )


def _paper(weights: int, activations: int) -> dict:
    """The protocol of Reg-PTQ's tables: log-affine heads, uniform elsewhere, first layer 8-bit, output layers float."""
    preset = _low_bit(weights, activations)
    preset['weights']['quantizer'] = _AFFINE
    preset['activations'].pop('scale_migration', None)
    return {**preset, 'head': dict(weights=dict(quantizer=_LOG_AFFINE)), 'last': HEAD_POLICIES['float']}


PRESETS = {
    # Everything in 8 bits, head and outputs included, then the filtered global loss.
    'w8a8': dict(weights=dict(bits=8), activations=dict(bits=8), global_loss=dict()),
    # The same without training, from range observers and compensated rounding: seconds instead of minutes. Scales that
    # are trained would round anew what was made up for.
    'w8a8_observe': dict(weights=dict(bits=8), activations=dict(bits=8), rounding='compensated'),
    'w4a8': _low_bit(4, 8),
    'w4a4': _low_bit(4, 4),
    'w3a3': _low_bit(3, 3),
    'w2a4': _low_bit(2, 4),
    'paper_w4a8': _paper(4, 8),
    'paper_w4a4': _paper(4, 4),
    'paper_w3a3': _paper(3, 3),
    'paper_w2a4': _paper(2, 4),
}
