"""The ``ptq`` block of a config as typed dataclasses: defaults, presets, validation with did-you-mean."""
from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import PTQError, did_you_mean
from .presets import HEAD_POLICIES, PRESETS

BITS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclass
class CalibrationConfig:
    """Which images calibrate the detector.

    Args:
        num_images: How many images are drawn from the training set. Defaults to 256.
        seed: Seed of the draw and of the batch order. Defaults to 0.
        batch_size: Images per forward pass while ranges are observed. Defaults to 4.
        images: A folder of images to calibrate on instead of the training set (no annotations needed).
        dataset: A dataset config to calibrate on instead of the training set; its ``pipeline`` is replaced by
            the test pipeline. At most one of ``images`` and ``dataset`` may be given.
    """

    num_images: int = 256
    seed: int = 0
    batch_size: int = 4
    images: str | None = None
    dataset: dict | None = None

    def check(self, key: str) -> None:
        _positive(key, self, 'num_images', 'batch_size')
        if self.images is not None and self.dataset is not None:
            raise PTQError(f'`{key}` names both `images` and `dataset`; keep one of them.')


@dataclass
class TensorConfig:
    """How one kind of tensor (weights or activations) is quantized.

    Args:
        bits: Bit width, 2 to 8 or 16. Defaults to 8.
        quantizer: Config of the number format, from the ``QUANTIZERS`` registry.
        observer: Config of the range observer, from the ``OBSERVERS`` registry.
        depthwise_per_channel: Activations only: the input of a depthwise convolution gets one scale per channel
            (each output channel reads one input channel, so it stays integer arithmetic). Defaults to True.
        float: Leave the tensor in floating point. Defaults to False.
    """

    bits: int = 8
    quantizer: dict = field(default_factory=lambda: dict(type='mmdet_ptq.AffineQuantizer'))
    observer: dict = field(default_factory=lambda: dict(type='mmdet_ptq.MSEObserver'))
    depthwise_per_channel: bool = True
    float: bool = False

    def check(self, key: str) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise PTQError(f'`{key}.bits` must be one of 2..8 or 16, got {self.bits!r}.')
        for part in ('quantizer', 'observer'):
            if not isinstance(getattr(self, part).get('type'), str):
                raise PTQError(f'`{key}.{part}` must be a dict with a `type`, got {getattr(self, part)!r}.')


@dataclass
class GlobalLossConfig:
    """The global stage: filtered global loss (Reg-PTQ, CVPR 2024) and the iterations that minimise it.

    Args:
        type: Only ``'mmdet_ptq.FilteredGlobalLoss'``.
        score_thr: theta_C, least confidence of the float detector's box. Defaults to 2e-4.
        iou_thr: theta_I, least IoU of the float and the quantized box. Defaults to 0.1.
        box_weight: lambda, weight of the box term. Defaults to 1.0.
        cls_weight: Weight of the classification term. Defaults to 1.0.
        quality_weight: Weight of the objectness / centerness term. Defaults to 1.0.
        distribution_weight: Weight of the box distribution term of GFL-style heads. Defaults to 0.25.
        combine: ``'and'`` (both filters must pass) or ``'or'``. Defaults to ``'and'``.
        box_loss: ``'l1'`` (divided by the float box's size), ``'giou'`` or ``'deltas'`` (centre shift and log size
            ratio). Defaults to ``'l1'``.
        p: Exponent of the ``'l1'`` box term. Defaults to 1.
        target: ``'float'`` (the float detector) or ``'ground_truth'``. Defaults to ``'float'``.
        max_boxes: Keep only this many boxes an image, by the float detector's confidence; bounds memory.
            Defaults to 1000.
        iters: Iterations. Defaults to 200.
        batch_size: Images per iteration. Defaults to 4.
        lr: Learning rate, relative to the size of each scale. Defaults to 1e-3.
        bias_lr: Learning rate of the biases, relative to their spread; 0 leaves them. Defaults to 1e-3.
        holdout: Share of the calibration images kept apart to choose the best state. Defaults to 0.125.
        val_interval: Iterations between two looks at the held-out images. Defaults to 50.
        checkpoint_interval: Iterations between two checkpoints (what a killed run loses at most).
            Defaults to 50.
        log_interval: Iterations between two log lines. Defaults to 10.
        optim_wrapper: mmengine optimizer wrapper; its learning rate is set by ``lr``.
        param_scheduler: mmengine schedulers; by default a cosine from ``lr`` to 0.
        hooks: Further mmengine hooks for this stage.
    """

    type: str = 'mmdet_ptq.FilteredGlobalLoss'
    score_thr: float = 2e-4
    iou_thr: float = 0.1
    box_weight: float = 1.0
    cls_weight: float = 1.0
    quality_weight: float = 1.0
    distribution_weight: float = 0.25
    combine: str = 'and'
    box_loss: str = 'l1'
    p: float = 1
    target: str = 'float'
    max_boxes: int | None = 1000
    iters: int = 200
    batch_size: int = 4
    lr: float = 1e-3
    bias_lr: float = 1e-3
    holdout: float = 0.125
    val_interval: int = 50
    checkpoint_interval: int = 50
    log_interval: int = 10
    optim_wrapper: dict = field(default_factory=lambda: dict(type='OptimWrapper', optimizer=dict(type='Adam')))
    param_scheduler: list | None = None
    hooks: list = field(default_factory=list)

    LOSS_KEYS = ('score_thr', 'iou_thr', 'box_weight', 'cls_weight', 'quality_weight', 'distribution_weight',
                 'combine', 'box_loss', 'p', 'target', 'max_boxes')

    def check(self, key: str) -> None:
        if self.type.rpartition('.')[2] != 'FilteredGlobalLoss':
            raise PTQError(f"`{key}.type` is {self.type!r}; only 'mmdet_ptq.FilteredGlobalLoss' is known.")
        _positive(key, self, 'iters', 'batch_size', 'lr', 'val_interval', 'checkpoint_interval', 'log_interval')
        _choice(f'{key}.combine', self.combine, ('and', 'or'))
        _choice(f'{key}.box_loss', self.box_loss, ('l1', 'giou', 'deltas'))
        _choice(f'{key}.target', self.target, ('float', 'ground_truth'))
        for name in ('score_thr', 'iou_thr'):
            if not 0 <= getattr(self, name) <= 1:
                raise PTQError(f'`{key}.{name}` must lie between 0 and 1, got {getattr(self, name)!r}.')
        if not 0 <= self.holdout < 1:
            raise PTQError(f'`{key}.holdout` must lie in [0, 1), got {self.holdout!r}.')

    def loss_kwargs(self) -> dict:
        """The arguments of :class:`mmdet_ptq.calibration.FilteredGlobalLoss`."""
        return {name: getattr(self, name) for name in self.LOSS_KEYS}


# What a policy dict (`head`, `first`, `last`, an override) may hold.
POLICY_KEYS = ('weights', 'activations')
KEYS = ('preset', 'calibration', 'weights', 'activations', 'head', 'first', 'last', 'overrides', 'reconstruct',
        'global_loss', 'export')


@dataclass
class PTQConfig:
    """The whole ``ptq`` block.

    Args:
        preset: Name of the preset the block starts from (see :mod:`mmdet_ptq.presets`).
        calibration: Calibration images.
        weights: Format of all weights.
        activations: Format of all layer inputs.
        head: What differs in the detection heads: a dict with ``weights`` / ``activations``, or one of the named
            policies ``'float'``, ``'float_outputs'``, ``'affine'``, ``'log_affine'``.
        first: What differs in the layers that read the image.
        last: What differs in the output layers of the heads.
        overrides: Pattern of layer names to what differs there (``'float'`` or a policy dict); the last matching
            pattern wins, a pattern that matches nothing is an error.
        reconstruct: Local reconstruction; None skips the stage.
        global_loss: The global stage; None skips it.
        export: Names of the runtimes to export to.
    """

    preset: str | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    weights: TensorConfig = field(default_factory=TensorConfig)
    activations: TensorConfig = field(default_factory=TensorConfig)
    head: dict = field(default_factory=dict)
    first: dict = field(default_factory=dict)
    last: dict = field(default_factory=dict)
    overrides: dict = field(default_factory=dict)
    reconstruct: dict | None = None
    global_loss: GlobalLossConfig | None = None
    export: list = field(default_factory=list)

    @classmethod
    def from_dict(cls, block: Mapping | None, preset: str | None = None) -> PTQConfig:
        """Builds and validates the block.

        Args:
            block: The ``ptq`` value of a config.
            preset: Replaces the block's own ``preset``.

        Raises:
            PTQError: An unknown key, an unknown name or a value out of range, named with the fix.
        """
        if block is None and preset is None:
            raise PTQError("the config has no `ptq` block; add `ptq = dict(preset='w8a8')` or pass --preset.")
        block = _plain(block or {})
        if not isinstance(block, dict):
            raise PTQError(f'`ptq` must be a dict, got {type(block).__name__}.')
        _known_keys('ptq', block, KEYS)
        name = preset or block.get('preset') or 'w8a8'
        _choice('ptq.preset', name, tuple(PRESETS))
        for key, kind in (('overrides', 'dict'), ('export', 'list')):
            if key in block:
                _check_type(f'ptq.{key}', block[key], kind)
        merged = _merge(copy.deepcopy(PRESETS[name]), {k: v for k, v in block.items() if k != 'preset'})
        cfg = cls(
            preset=name,
            calibration=_build(CalibrationConfig, 'ptq.calibration', merged.get('calibration', {})),
            weights=apply_policy(TensorConfig(), merged.get('weights', {}), 'ptq.weights'),
            activations=apply_policy(TensorConfig(), merged.get('activations', {}), 'ptq.activations'),
            head=_policy('ptq.head', merged.get('head', {})),
            first=_policy('ptq.first', merged.get('first', {})),
            last=_policy('ptq.last', merged.get('last', {})),
            overrides={p: _policy(f'ptq.overrides[{p!r}]', v) for p, v in merged.get('overrides', {}).items()},
            reconstruct=merged.get('reconstruct'),
            export=list(merged.get('export', [])))
        if merged.get('global_loss') is not None:
            cfg.global_loss = _build(GlobalLossConfig, 'ptq.global_loss', merged['global_loss'])
        for key in ('reconstruct', 'export'):
            if getattr(cfg, key):
                raise PTQError(f'`ptq.{key}` is not available in this version; remove the key.')
        if 'last' in cfg.head:
            cfg.last = _merge(cfg.last, cfg.head['last'])
        return cfg

    def to_dict(self) -> dict:
        """Plain dict, as it is written to ``results.json``."""
        return asdict(self)


def apply_policy(base: TensorConfig, change: Mapping, key: str) -> TensorConfig:
    """Returns ``base`` with the keys of one policy entry replaced, checked.

    Args:
        base: What holds without the change.
        change: The ``weights`` or ``activations`` entry of a policy.
        key: Where the change stands in the config, for messages.
    """
    if not isinstance(change, Mapping):
        raise PTQError(f'`{key}` must be a dict, got {change!r}.')
    return _build(TensorConfig, key, _merge(asdict(base), change))


def _policy(key: str, value: Any) -> dict:
    """Checks a policy: the name of one, or a dict of tensor changes."""
    if isinstance(value, str):
        if key.startswith('ptq.overrides') and value != 'float':
            raise PTQError(f"`{key}` must be 'float' or a dict, got {value!r}.")
        _choice(key, value, tuple(HEAD_POLICIES))
        return copy.deepcopy(HEAD_POLICIES[value])
    if not isinstance(value, dict):
        raise PTQError(f'`{key}` must be a dict or a policy name, got {value!r}.')
    allowed = (*POLICY_KEYS, 'last') if key == 'ptq.head' else POLICY_KEYS
    _known_keys(key, value, allowed)
    for part in POLICY_KEYS:
        if part in value:
            apply_policy(TensorConfig(), value[part], f'{key}.{part}')
    if 'last' in value:
        _policy(f'{key}.last', value['last'])
    return value


def _build(cls, key: str, values: Any):
    if not isinstance(values, dict):
        raise PTQError(f'`{key}` must be a dict, got {values!r}.')
    known = {f.name: f for f in fields(cls)}
    _known_keys(key, values, known)
    for name, value in values.items():
        _check_type(f'{key}.{name}', value, known[name].type)
    built = cls(**values)
    built.check(key)
    return built


_TYPES = {'int': int, 'float': (int, float), 'str': str, 'bool': bool, 'dict': dict, 'list': (list, tuple),
          'None': type(None)}


def _check_type(key: str, value: Any, annotation: str) -> None:
    names = [part.strip() for part in annotation.split('|')]
    allowed = tuple(t for n in names for t in (_TYPES[n] if isinstance(_TYPES[n], tuple) else (_TYPES[n],)))
    if isinstance(value, bool) and bool not in allowed or not isinstance(value, allowed):
        raise PTQError(f'`{key}` must be {annotation}, got {value!r}.')


def _known_keys(key: str, values: Mapping, known) -> None:
    for name in values:
        if name not in known:
            raise PTQError(f'`{key}` has no key {name!r}.{did_you_mean(name, known)} Known: {", ".join(known)}.')


def _choice(key: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise PTQError(f'`{key}` is {value!r}, which is unknown.{did_you_mean(value, choices)} '
                       f'Known: {", ".join(choices)}.')


def _positive(key: str, obj: Any, *names: str) -> None:
    for name in names:
        if getattr(obj, name) <= 0:
            raise PTQError(f'`{key}.{name}` must be positive, got {getattr(obj, name)!r}.')


def _merge(base: dict, change: Mapping) -> dict:
    """Deep merge; a dict with a new ``type`` replaces the old one instead of inheriting its arguments."""
    out = dict(base)
    for key, value in change.items():
        old = out.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and key != 'overrides' \
                and value.get('type', old.get('type')) == old.get('type'):
            out[key] = _merge(dict(old), value)
        else:
            out[key] = copy.deepcopy(value)
    return out


def _plain(value: Any) -> Any:
    """Mmengine's ConfigDict and friends as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, type):
        return f'{value.__module__}.{value.__qualname__}'
    return value
