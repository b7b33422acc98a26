"""The structure of a quantized detector as plain data: enough to rebuild it before its numbers are loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.fields import Each, Fields, Malformed, Whole, check_form
from mmdet_ptq.quantizers import build_quantizer
from mmdet_ptq.registry import QUANTIZERS, registered
from mmdet_ptq.wrapping.flow import Product, Site, attach_dataflow
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.inputs import attach_inputs
from mmdet_ptq.wrapping.state import ChannelDivision, QuantizationState, is_quantized
from mmdet_ptq.wrapping.watching.attention import open_attentions
from mmdet_ptq.wrapping.watching.layers import add_bias
from mmdet_ptq.wrapping.weights import attach_weight

# more than the widest layers of any detector have
MOST_CHANNELS = 2**20


@dataclass
class LayerStructure:
    """One convolution or linear layer.

    Attributes:
        name: Path in the detector.
        kind: ``'convolution'``, ``'depthwise convolution'``, ``'transposed convolution'`` or ``'linear'``.
        part: The detector's child it belongs to (backbone, neck, bbox_head, ...).
        macs: Multiply-accumulates of one image, over all calls.
        numel: Number of weights.
        weight: Spec of the weight quantizer; None leaves the weight float.
        inputs: One activation name per call; None leaves that input float.
        outputs: One activation name per call, where outputs are quantized where they are computed; empty otherwise.
        reason: Why anything of the layer stays float; empty when it computes in integers.
    """

    name: str
    kind: str
    part: str
    macs: int
    numel: int
    weight: dict | None = None
    inputs: list[str | None] = field(default_factory=list)
    outputs: list[str | None] = field(default_factory=list)
    reason: str = ''

    @property
    def integer(self) -> bool:
        return self.weight is not None and bool(self.inputs) and None not in self.inputs


@dataclass
class ActivationStructure:
    """One quantized tensor that layers read or write.

    Attributes:
        spec: Spec of its quantizer.
        readers: How many calls of layers, and products, read it in a forward pass.
        observer: What finds its range.
        range: Its two ends, where they are known beforehand.
        moved: Whether values are quantized before they are moved into the tensor.
        divided: ``dict(channels=..., axis=...)`` where weights took over factors of its channels.
    """

    spec: dict
    readers: int
    observer: dict | None = None
    range: list[float] | None = None
    moved: bool = False
    divided: dict | None = None

    def to_dict(self) -> dict:
        """Plain values; what most activations do not have is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None and value is not False}


@dataclass
class Structure:
    """A quantized detector without its numbers.

    Attributes:
        folds: (convolution, normalisation) pairs that are folded.
        norms: Normalisations that stay float, and why.
        layers: Every convolution and linear layer, quantized or not.
        activations: Quantized tensors, by name.
        uncovered: Weighted operations outside layers: module, operation, reason, macs.
        biases: Layers that got a bias which they did not have in the float detector, folding aside.
        sites: Functional operations whose results are quantized (see :class:`mmdet_ptq.wrapping.flow.Site`).
        module_calls: Modules whose operations are counted to find the sites, and how often each runs in a pass.
        products: Products of two activations that are quantized (see :class:`mmdet_ptq.wrapping.flow.Product`).
        islands: Operations between quantized layers that stay float: module, operation, reason.
        attentions: Attentions whose projections became linear layers, see :mod:`mmdet_ptq.wrapping.watching.attention`.
    """

    folds: list[list[str]] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)
    layers: list[LayerStructure] = field(default_factory=list)
    activations: dict[str, ActivationStructure] = field(default_factory=dict)
    uncovered: list[dict] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    sites: list[dict] = field(default_factory=list)
    products: list[dict] = field(default_factory=list)
    module_calls: dict[str, int] = field(default_factory=dict)
    islands: list[dict] = field(default_factory=list)
    attentions: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain dicts and lists, for a checkpoint that loads without pickle."""
        activations = {name: activation.to_dict() for name, activation in self.activations.items()}
        return {**asdict(self), 'activations': activations}

    @classmethod
    def from_dict(cls, data: dict) -> Structure:
        """Inverse of :meth:`to_dict`.

        Raises:
            PTQError: A field is missing, unknown or of another form.
        """
        try:
            check_form(data, _STRUCTURE, 'the structure')
        except Malformed as error:
            raise PTQError(f'{error}; the file is damaged, run tools/ptq.py again.') from error
        layers = [LayerStructure(**layer) for layer in data['layers']]
        activations = {name: ActivationStructure(**entry) for name, entry in data['activations'].items()}
        return cls(**{**data, 'layers': layers, 'activations': activations})

    def check(self) -> None:
        """Refuses names of activations that are not there, and counts of readers that are not those of the layers.

        Raises:
            Malformed: What does not fit together.
        """
        read = Counter(name for layer in self.layers for name in layer.inputs if name)
        read.update(name for product in self.products for name in product['factors'])
        written = {name for layer in self.layers for name in layer.outputs if name}
        written |= {name for site in self.sites for name in (site['activation'], site.get('gate')) if name}
        unknown = (read.keys() | written) - self.activations.keys()
        if unknown:
            raise Malformed(f'the structure names the activation {min(unknown)[:100]}, which it does not have')
        for name, entry in self.activations.items():
            if entry.readers != read[name]:
                told = f'{entry.readers} readers, and {read[name]} layers read it'
                raise Malformed(f'the activation {name[:100]} tells of {told}')
            if entry.range is not None and len(entry.range) != 2:
                raise Malformed(f'the range of the activation {name[:100]} has not two ends')
        names = Counter(layer.name for layer in self.layers)
        if len(names) < len(self.layers):
            raise Malformed(f'the structure has the layer {names.most_common(1)[0][0][:100]} twice')
        if any(len(pair) != 2 for pair in self.folds):
            raise Malformed('a fold of the structure has not two names')
        if any(len(product['factors']) != 2 for product in self.products):
            raise Malformed('a product of the structure has not two factors')


def _format(spec: Any) -> str:
    """What is wrong with the spec of a quantizer; '' if nothing is."""
    if not isinstance(spec, dict) or not isinstance(spec.get('type'), str):
        return 'must be a dict with a `type`'
    if registered(QUANTIZERS, spec['type']) is None:
        return f'has the unknown format {spec["type"][:100]!r}'
    channels = spec.get('num_channels')
    if channels is not None and not (type(channels) is int and 1 <= channels <= MOST_CHANNELS):
        return f'has {channels!r:.40} channels'
    return ''


_TEXTS, _COUNT, _MAYBE = [str], Whole(), (None, str)
_LAYER = Fields(
    dict(name=str, kind=str, part=str, macs=_COUNT, numel=_COUNT),
    dict(weight=(None, _format), inputs=[_MAYBE], outputs=[_MAYBE], reason=str),
)
_ACTIVATION = Fields(
    dict(spec=_format, readers=_COUNT),
    dict(
        observer=(None, dict),
        range=[float],
        moved=bool,
        divided=Fields(dict(channels=Whole(1, MOST_CHANNELS), axis=Whole(-8, 8))),
    ),
)
_SITE = Fields(
    dict(module=str, call=_COUNT, function=str, index=_COUNT, activation=_MAYBE), dict(gate=_MAYBE, observes=bool)
)
_PRODUCT = Fields(dict(module=str, call=_COUNT, function=str, index=_COUNT, factors=[str], macs=_COUNT))
_STRUCTURE = Fields(
    dict(layers=[_LAYER], activations=Each(_ACTIVATION)),
    dict(
        folds=[_TEXTS],
        norms=Each(str),
        uncovered=[dict],
        biases=_TEXTS,
        sites=[_SITE],
        products=[_PRODUCT],
        module_calls=Each(Whole(1)),
        islands=[dict],
        attentions=_TEXTS,
    ),
)


def apply_structure(detector: nn.Module, structure: Structure) -> None:
    """Turns a float detector into the quantized one a structure describes, in place.

    The quantizers are built but not initialised; load their state or fit them afterwards.

    Args:
        detector: A float detector of the architecture the structure was made from.
        structure: What to build.

    Raises:
        PTQError: The detector is already quantized, or lacks a layer.
    """
    if is_quantized(detector):
        raise PTQError('the detector is already quantized; start from the float checkpoint.')
    open_attentions(detector, structure.attentions)
    fold_norms(detector, [tuple(pair) for pair in structure.folds])
    disable_checkpointing(detector)
    modules = dict(detector.named_modules())
    named = [layer.name for layer in structure.layers]
    named += [place['module'] for place in (*structure.sites, *structure.products)]
    missing = [name for name in (*named, *structure.module_calls) if name not in modules]
    if missing:
        raise PTQError(
            f'the detector lacks {len(missing)} layers of the quantized checkpoint, first {missing[0]}; '
            'use the config the checkpoint was made with.'
        )
    for name in structure.biases:
        add_bias(modules[name])
    for layer in structure.layers:
        if layer.weight is not None:
            attach_weight(modules[layer.name], build_quantizer(layer.weight))
    state = QuantizationState(
        {name: build_quantizer(entry.spec) for name, entry in structure.activations.items()},
        {name: entry.readers for name, entry in structure.activations.items()},
        [name for name, entry in structure.activations.items() if entry.moved],
        {name: ChannelDivision(**entry.divided) for name, entry in structure.activations.items() if entry.divided},
    )
    for name, entry in structure.activations.items():
        if entry.range is not None:
            state.activations[name].set_range(*map(torch.tensor, entry.range))
    inputs = {layer.name: layer.inputs for layer in structure.layers if any(layer.inputs)}
    attach_inputs(detector, state, inputs)
    outputs = {layer.name: layer.outputs for layer in structure.layers if any(layer.outputs)}
    if outputs or structure.sites or structure.products:
        places = [Site(**site) for site in structure.sites] + [Product(**product) for product in structure.products]
        attach_dataflow(detector, state, outputs, places, structure.module_calls)


def disable_checkpointing(detector: nn.Module) -> None:
    """Switches activation checkpointing off: a recomputed call would count as a second call of a layer."""
    for module in detector.modules():
        if getattr(module, 'with_cp', False):
            module.with_cp = False
