"""The structure of a quantized detector as plain data: enough to rebuild it before its numbers are loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import build_quantizer
from mmdet_ptq.wrapping.flow import Site, attach_dataflow
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.inputs import attach_inputs
from mmdet_ptq.wrapping.state import ChannelDivision, QuantizationState, is_quantized
from mmdet_ptq.wrapping.watching.layers import add_bias
from mmdet_ptq.wrapping.weights import attach_weight


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
class Structure:
    """A quantized detector without its numbers.

    Attributes:
        folds: (convolution, normalisation) pairs that are folded.
        norms: Normalisations that stay float, and why.
        layers: Every convolution and linear layer, quantized or not.
        activations: Activation name to ``dict(spec=..., readers=..., observer=...)``; with ``range`` where the range
            is known beforehand, with ``moved`` where values are quantized before they are moved into the tensor, with
            ``divided`` (channels, axis) where weights took over factors of its channels.
        uncovered: Weighted operations outside layers: module, operation, reason, macs.
        biases: Layers that got a bias which they did not have in the float detector, folding aside.
        sites: Functional operations whose results are quantized (see :class:`mmdet_ptq.wrapping.flow.Site`).
        module_calls: Modules whose operations are counted to find the sites, and how often each runs in a pass.
        islands: Operations between quantized layers that stay float: module, operation, reason.
    """

    folds: list[list[str]] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)
    layers: list[LayerStructure] = field(default_factory=list)
    activations: dict[str, dict] = field(default_factory=dict)
    uncovered: list[dict] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    sites: list[dict] = field(default_factory=list)
    module_calls: dict[str, int] = field(default_factory=dict)
    islands: list[dict] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain dicts and lists, for a checkpoint that loads without pickle."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Structure:
        """Inverse of :meth:`to_dict`."""
        return cls(**{**data, 'layers': [LayerStructure(**layer) for layer in data['layers']]})


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
    fold_norms(detector, [tuple(pair) for pair in structure.folds])
    disable_checkpointing(detector)
    modules = dict(detector.named_modules())
    missing = [layer.name for layer in structure.layers if layer.name not in modules]
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
        {name: build_quantizer(entry['spec']) for name, entry in structure.activations.items()},
        {name: entry['readers'] for name, entry in structure.activations.items()},
        [name for name, entry in structure.activations.items() if entry.get('moved')],
        {
            name: ChannelDivision(**entry['divided'])
            for name, entry in structure.activations.items()
            if 'divided' in entry
        },
    )
    for name, entry in structure.activations.items():
        if 'range' in entry:
            state.activations[name].set_range(*map(torch.tensor, entry['range']))
    inputs = {layer.name: layer.inputs for layer in structure.layers if any(layer.inputs)}
    attach_inputs(detector, state, inputs)
    outputs = {layer.name: layer.outputs for layer in structure.layers if any(layer.outputs)}
    if outputs or structure.sites:
        attach_dataflow(detector, state, outputs, [Site(**site) for site in structure.sites], structure.module_calls)


def disable_checkpointing(detector: nn.Module) -> None:
    """Switches activation checkpointing off: a recomputed call would count as a second call of a layer."""
    for module in detector.modules():
        if getattr(module, 'with_cp', False):
            module.with_cp = False
