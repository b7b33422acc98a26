"""The ``ptq`` block of a config as typed dataclasses: defaults, presets, validation with did-you-mean."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from mmdet_ptq.config.checks import build, check_type, known_keys, merge
from mmdet_ptq.config.formats import check_format
from mmdet_ptq.config.presets import HEAD_POLICIES, PRESETS, RECONSTRUCTION_METHODS
from mmdet_ptq.config.sections import (
    SATURATIONS,
    ActivationConfig,
    CalibrationConfig,
    GlobalLossConfig,
    ProtectConfig,
    ReconstructConfig,
    TensorConfig,
)
from mmdet_ptq.errors import PTQError, check_choice
from mmdet_ptq.fields import plain, qualified
from mmdet_ptq.registry import RUNTIMES, runtime_names

# What a policy dict (`head`, `first`, `last`, an override) may hold.
POLICY_KEYS = ('weights', 'activations')
KEYS = (
    'preset',
    'calibration',
    'weights',
    'activations',
    'rounding',
    'saturation',
    'dataflow',
    'products',
    'head',
    'first',
    'last',
    'overrides',
    'protect',
    'reconstruct',
    'global_loss',
    'export',
    'export_size',
)
# of `export_size`: it stays open
DYNAMIC = 'dynamic'
DATAFLOWS = ('accuracy', 'balanced', 'speed')
# as they were called before
# of two activations
PRODUCTS = ('integer', 'float')
ROUNDINGS = ('nearest', 'compensated')
_DATAFLOWS = {'per_channel': 'accuracy', 'auto': 'balanced', 'full': 'speed'}
# keys of earlier versions, why they are no more and what replaces them; where they were off, nothing is said
GONE = {
    'bias_correction': 'it brought nothing beyond chance on four detectors and cost two of YOLOX up to 1.2 points; '
    'remove it, `ptq.reconstruct` fits biases with the weights',
    'equalize': 'cross-layer equalization brought nothing beyond chance on six detectors; remove it, or even out the '
    'channels of 4-bit inputs with `ptq.activations.scale_migration`',
}
# the same within sections: what they are now, whatever they say; where they say that, nothing is said
GONE_WITHIN = {
    'reconstruct': dict(type='BlockReconstruction', rounding_weight=0.01, warmup=0.2, beta_start=20, beta_end=2),
    'global_loss': dict(type='FilteredGlobalLoss', p=1),
}


@dataclass
class PTQConfig:
    """The whole ``ptq`` block.

    Args:
        preset: Name of the preset the block starts from (see :mod:`mmdet_ptq.config.presets`).
        calibration: Calibration images.
        weights: Format of all weights.
        activations: Format of all layer inputs.
        rounding: ``'nearest'`` rounds each weight to the nearest value of its grid. ``'compensated'`` makes up for each
            rounding error with the weights of the output channel that follow, and with its bias, on what the layer
            reads of 16 calibration images; scales stay as they are. Not together with ``reconstruct``, which solves
            the weights itself. What the preset ``'w8a8_observe'`` says of it does not hold once ``reconstruct`` or
            ``global_loss`` is added.
        saturation: x86 processors without VNNI add two products of bytes in 16 bits. With ``'safe'`` no sum exceeds
            them: 8-bit weights of an output channel that are multiplied side by side, have the same sign and exceed 128
            together get a larger scale, as much as they need, and log-affine tables end at 64 instead of 127; exported
            models then compute the same everywhere. ``'ignore'`` leaves the scales alone: on such processors the model
            is wrong, except in ncnn, whose kernels add in 32 bits, and whose models have it by default.
        dataflow: What else is quantized between the layers, and where the heads' output layers write unless these
            are pointwise: layer outputs, sums, products, activation functions, poolings, in 8 bits, which ONNX
            Runtime needs to compute every convolution and addition in integers. There a tensor has one scale. With
            ``'accuracy'`` convolutions in front of SiLU, HardSwish, LeakyReLU and their like keep a scale per channel,
            or hand on floats where they are pointwise, and the activation function computes in float, and what
            depthwise convolutions and others read stays float where it is computed; ``'speed'`` gives one scale to all
            but what depthwise convolutions alone read; ``'balanced'`` gives it where it costs the detections least,
            measured on calibration images, and is the default with ``'onnxruntime'`` in ``export``; None quantizes
            nothing but layer inputs. The earlier names ``'per_channel'``, ``'full'`` and ``'auto'`` mean the same.
        products: Products of two activations inside attention, windows and dynamic layers. ``'integer'`` quantizes both
            factors where the product reads them, each with one scale and no zero point, as runtimes multiply them in
            integers; ``'float'`` leaves them. Defaults to ``'integer'``, with ``'ncnn'`` first in ``export`` to
            ``'float'``. They have 8 bits, right factors 7 with ``saturation='safe'``.
        head: What differs in the detection heads: a dict with ``weights`` / ``activations``, or one of the named
            policies ``'float'``, ``'float_outputs'``, ``'affine'``, ``'log_affine'``.
        first: What differs in the layers that read the image.
        last: What differs in the output layers of the heads.
        overrides: Pattern of layer names to what differs there (``'float'`` or a policy dict); the last matching
            pattern wins, a pattern that matches nothing is an error.
        protect: Automatic protection of the most sensitive tensors; None skips the stage.
        reconstruct: Local reconstruction; None skips the stage.
        global_loss: The global stage; None skips it.
        export: Names of the runtimes to export to (``'onnxruntime'``, ``'openvino'``, ...); each model is evaluated
            and timed there. What the block leaves open is as the first of them takes it; those that take it otherwise
            (``'tensorrt'`` and ``'ncnn'`` know no zero points, ``'onnxruntime'`` alone needs a ``dataflow``) get a
            calibration of their own.
        export_size: Height and width of the tensor that exported models take; None takes what the test pipeline gives,
            and where it gives several sizes (``keep_ratio``) a canvas that holds them all. Smaller images are padded to
            it at the right and below, as mmdet pads images in a batch. ``'dynamic'`` leaves the size open
            (``'onnxruntime'`` and ``'openvino'``): nothing is padded but to the detector's divisor.

    Attributes:
        block: The block as it was given, with its preset.
    """

    preset: str | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    weights: TensorConfig = field(default_factory=TensorConfig)
    activations: TensorConfig = field(default_factory=ActivationConfig)
    rounding: str = ROUNDINGS[0]
    saturation: str = SATURATIONS[0]
    dataflow: str | None = None
    products: str = PRODUCTS[0]
    head: dict = field(default_factory=dict)
    first: dict = field(default_factory=dict)
    last: dict = field(default_factory=dict)
    overrides: dict = field(default_factory=dict)
    protect: ProtectConfig | None = None
    reconstruct: ReconstructConfig | None = None
    global_loss: GlobalLossConfig | None = None
    export: list = field(default_factory=list)
    export_size: tuple | str | None = None
    block: ClassVar[dict] = {}

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
        block = plain(block or {}, lambda value: qualified(value) if isinstance(value, type) else value)
        if not isinstance(block, dict):
            raise PTQError(f'`ptq` must be a dict, got {type(block).__name__}.')
        for key in GONE.keys() & block:
            if block.pop(key):
                raise PTQError(f'`ptq.{key}` is gone: {GONE[key]}.')
        for name, gone in GONE_WITHIN.items():
            section = block.get(name)
            for key in gone.keys() & section if isinstance(section, dict) else ():
                value = section.pop(key)
                if isinstance(value, str):
                    value = value.rpartition('.')[2]
                if value != gone[key]:
                    raise PTQError(f'`ptq.{name}.{key}` is gone: it is always {gone[key]!r}; remove it.')
        if isinstance(block.get('global_loss'), dict) and 'mirror' in block['global_loss']:
            raise PTQError(
                '`ptq.global_loss.mirror` is gone: say `augment=2` to train on mirror images, too, or `augment=1`.'
            )
        known_keys('ptq', block, KEYS)
        name = preset or block.get('preset') or 'w8a8'
        check_choice('ptq.preset', name, tuple(PRESETS))
        for key, kind in (('dataflow', str | None), ('overrides', dict), ('export', list)):
            if key in block:
                check_type(f'ptq.{key}', block[key], kind)
        merged = merge(copy.deepcopy(PRESETS[name]), {k: v for k, v in block.items() if k != 'preset'})
        _add_needed_formats(merged)
        merged['reconstruct'] = _with_method(merged.get('reconstruct'))
        saturation = merged.get('saturation', _needed_saturation(merged.get('export', [])))
        check_choice('ptq.saturation', saturation, SATURATIONS)
        trained = merged['reconstruct'] is not None or merged.get('global_loss') is not None
        if trained and 'rounding' not in block:  # what trains or solves weights and scales rounds anew
            merged['rounding'] = ROUNDINGS[0]
        rounding = merged.get('rounding', ROUNDINGS[0])
        check_choice('ptq.rounding', rounding, ROUNDINGS)
        products = merged.get('products', needed_products(merged.get('export', [])))
        check_choice('ptq.products', products, PRODUCTS)
        dataflow = merged.get('dataflow', _needed_dataflow(merged.get('export', [])))
        cfg = cls(
            preset=name,
            calibration=build(CalibrationConfig, 'ptq.calibration', merged.get('calibration', {})),
            weights=apply_policy(TensorConfig(saturation=saturation), merged.get('weights', {}), 'ptq.weights'),
            rounding=rounding,
            saturation=saturation,
            activations=apply_policy(ActivationConfig(), merged.get('activations', {}), 'ptq.activations'),
            head=_policy('ptq.head', merged.get('head', {})),
            first=_policy('ptq.first', merged.get('first', {})),
            last=_policy('ptq.last', merged.get('last', {})),
            dataflow=_DATAFLOWS.get(dataflow, dataflow),
            products=products,
            overrides={p: _policy(f'ptq.overrides[{p!r}]', v) for p, v in merged.get('overrides', {}).items()},
            export=list(merged.get('export', [])),
        )
        if merged.get('export_size') is not None:
            size = merged['export_size']
            sides = isinstance(size, list | tuple) and [type(side) for side in size] == [int, int]
            if size != DYNAMIC and (not sides or min(size) < 1):
                raise PTQError(
                    f'`ptq.export_size` must be a height and a width, as (800, 1344), or {DYNAMIC!r}, got {size!r}.'
                )
            cfg.export_size = size if size == DYNAMIC else tuple(size)
        for name, section in (
            ('protect', ProtectConfig),
            ('reconstruct', ReconstructConfig),
            ('global_loss', GlobalLossConfig),
        ):
            if merged.get(name) is not None:
                setattr(cfg, name, build(section, f'ptq.{name}', merged[name]))
        if cfg.dataflow is not None:
            check_choice('ptq.dataflow', cfg.dataflow, DATAFLOWS)
        if cfg.rounding == 'compensated' and cfg.reconstruct is not None:
            raise PTQError(
                "`ptq.rounding='compensated'` and `ptq.reconstruct` both choose the codes of weights; remove one of "
                'them, or say `ptq.reconstruct=None`.'
            )
        if not all(isinstance(name, str) for name in cfg.export) or len(set(cfg.export)) < len(cfg.export):
            raise PTQError(f'`ptq.export` must be a list of different runtime names, got {cfg.export!r}.')
        if 'last' in cfg.head:
            cfg.last = merge(cfg.last, cfg.head['last'])
        cfg._check_formats()
        cfg.block = {**block, 'preset': cfg.preset}
        return cfg

    def by_runtime(self) -> list[PTQConfig]:
        """One block for each group of runtimes of ``export`` that are calibrated alike; this one where all are.

        Runtimes differ in what they compute between the layers and in the number formats that they know; where the
        block itself says so, it holds for all.
        """
        if not self.block:  # made by hand, not from a config
            return [self]
        alone = [PTQConfig.from_dict({**self.block, 'export': [name]}) for name in self.export]
        groups: list[PTQConfig] = []
        for block in alone:
            known = next((g for g in groups if {**g.to_dict(), 'export': block.export} == block.to_dict()), None)
            if known is None:
                groups.append(block)
            else:
                known.export += block.export
        return groups or [self]

    def deprecated(self) -> list[str]:
        """A sentence for each name of earlier versions that the block uses, with the one that replaces it."""
        old = self.block.get('dataflow')
        return [f'`ptq.dataflow={old!r}` is now called {_DATAFLOWS[old]!r}.'] if old in _DATAFLOWS else []

    def _check_formats(self) -> None:
        """Of the general formats and of what differs by role; overrides are checked where their layers are known."""
        for part in POLICY_KEYS:
            general = getattr(self, part)
            check_format(general, part, f'ptq.{part}')
            in_head = apply_policy(general, self.head.get(part, {}), f'ptq.head.{part}')
            check_format(in_head, part, f'ptq.head.{part}')
            for key, base, change in (('first', general, self.first), ('last', in_head, self.last)):
                check_format(apply_policy(base, change.get(part, {}), f'ptq.{key}.{part}'), part, f'ptq.{key}.{part}')

    def to_dict(self) -> dict:
        """Plain dict, as it is written to ``results.json``."""
        return asdict(self)


def _runtimes(export: Any) -> list:
    """The runtimes of ``ptq.export``; wrong ones are told of where they are checked."""
    known = runtime_names()
    return [RUNTIMES.get(name) for name in export if isinstance(name, str) and name in known]


def _needed_dataflow(export: list) -> str | None:
    """What the first runtime needs."""
    return next((runtime.dataflow for runtime in _runtimes(export[:1])), None)


def needed_products(export: list) -> str:
    """What the first runtime computes."""
    return next((runtime.products for runtime in _runtimes(export[:1])), PRODUCTS[0])


def _needed_saturation(export: list) -> str:
    """What the first runtime needs; the safe one without any."""
    return next((runtime.saturation for runtime in _runtimes(export[:1])), SATURATIONS[0])


def _add_needed_formats(merged: dict) -> None:
    """Gives the activations' quantizer what the first runtime's formats take, where the block says nothing."""
    activations = merged.get('activations', {})
    if not isinstance(activations, dict) or not isinstance(activations.get('quantizer', {}), dict):
        return  # told of where it is checked
    needed: dict = {}
    for runtime in _runtimes(merged.get('export', [])[:1]):
        needed.update(runtime.needed_activations(activations.get('bits', TensorConfig().bits)))
    if activations.get('quantizer', {}).get('symmetric'):
        needed.pop('shared_zero_point', None)  # there is none to share
    if needed:
        merged['activations'] = {**activations, 'quantizer': {**needed, **activations.get('quantizer', {})}}


def _with_method(section: Any) -> Any:
    """The ``reconstruct`` section with the settings of the published method that it names."""
    if isinstance(section, str):
        section = dict(method=section)
    if not isinstance(section, dict) or section.get('method') is None:
        return section
    check_choice('ptq.reconstruct.method', section['method'], tuple(RECONSTRUCTION_METHODS))
    return {**RECONSTRUCTION_METHODS[section['method']], **section}


def apply_policy(base: TensorConfig, change: Mapping, key: str) -> TensorConfig:
    """Returns ``base`` with the keys of one policy entry replaced, checked.

    Args:
        base: What holds without the change.
        change: The ``weights`` or ``activations`` entry of a policy.
        key: Where the change stands in the config, for messages.
    """
    if not isinstance(change, Mapping):
        raise PTQError(f'`{key}` must be a dict, got {change!r}.')
    return build(type(base), key, merge(asdict(base), change))


def _policy(key: str, value: Any) -> dict:
    """Checks a policy: the name of one, or a dict of tensor changes."""
    if isinstance(value, str):
        if key.startswith('ptq.overrides') and value != 'float':
            raise PTQError(f"`{key}` must be 'float' or a dict, got {value!r}.")
        # a policy that says what differs in the output layers says nothing about a layer itself
        check_choice(
            key, value, tuple(n for n, policy in HEAD_POLICIES.items() if key == 'ptq.head' or 'last' not in policy)
        )
        return copy.deepcopy(HEAD_POLICIES[value])
    if not isinstance(value, dict):
        raise PTQError(f'`{key}` must be a dict or a policy name, got {value!r}.')
    allowed = (*POLICY_KEYS, 'last') if key == 'ptq.head' else POLICY_KEYS
    known_keys(key, value, allowed)
    for part in POLICY_KEYS:
        if part in value:
            apply_policy(TensorConfig(), value[part], f'{key}.{part}')
    return {**value, 'last': _policy(f'{key}.last', value['last'])} if 'last' in value else value
