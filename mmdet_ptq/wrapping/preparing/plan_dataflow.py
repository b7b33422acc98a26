"""Which tensors between the layers are quantized, found from one float forward pass.

The pass is watched operation by operation (:mod:`mmdet_ptq.wrapping.watching.recorder`); what is found there is written
into the structure, from which :mod:`mmdet_ptq.wrapping.flow` rebuilds it without running the detector.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.quantizers import build_quantizer
from mmdet_ptq.wrapping.flow import Site
from mmdet_ptq.wrapping.names import output_name, result_name
from mmdet_ptq.wrapping.preparing.choose_scales import Scales, choose_scales, give_one_scale, give_one_zero_point
from mmdet_ptq.wrapping.preparing.dataflow_graph import DataflowGraph
from mmdet_ptq.wrapping.preparing.plan_products import plan_products
from mmdet_ptq.wrapping.structure import ActivationStructure, Structure
from mmdet_ptq.wrapping.watching.channel_costs import BITS, Weigh
from mmdet_ptq.wrapping.watching.layers import channel_axis, channel_format, is_pointwise, out_channels
from mmdet_ptq.wrapping.watching.operations import (
    FUNCTIONS,
    GATED,
    GATES,
    LAYER,
    MOVEMENT,
    NORMS,
    UNKNOWN,
    keeps_channels,
)
from mmdet_ptq.wrapping.watching.recorder import Key, Operation, record_operations


class _Planner:
    """Gives every tensor between quantized layers its quantizer."""

    def __init__(
        self,
        graph: DataflowGraph,
        structure: Structure,
        cfg: PTQConfig,
        calls: dict[str, int],
        outputs: frozenset[str],
        scales: Scales,
    ) -> None:
        self.graph, self.structure, self.calls = graph, structure, calls
        self.outputs = outputs
        self.scales = scales
        self.left_float: list[Operation] = []  # where they compute, for readers with quantizers of their own
        policy = cfg.activations
        bits = max(policy.bits, BITS)
        self.spec = build_quantizer({**policy.quantizer, 'bits': bits, 'num_channels': None, 'channel_axis': 1}).spec()
        self.gate_spec = build_quantizer(
            dict(
                type='mmdet_ptq.AffineQuantizer',
                bits=bits,
                symmetric=bool(policy.quantizer.get('symmetric', False)),
                narrow_range=bool(policy.quantizer.get('narrow_range', False)),
                learn_scale=False,
            )
        ).spec()
        self.observer = policy.observer
        self.names: dict[Key, str] = {}

    def plan(self) -> None:
        """Writes quantizers, outputs and sites into the structure."""
        graph, layers = self.graph, self.graph.layers
        self._one_scale_where_others_read()
        found = [
            op
            for op in graph.operations
            if graph.between(op)
            and not graph.fused(op)
            and not self._is_float_gate(op)
            and not self._ends_in_float(op)
            and op not in self.left_float
        ]
        self._one_zero_point_where_layers_write(found)
        for op in found:
            self.name_of(op)
        for op in found:
            name = self.names[op.outputs[0]]
            if op.kind == LAYER:
                layer = layers[op.name]
                layer.outputs = layer.outputs or [None] * len(layer.inputs)
                layer.outputs[op.place[1]] = name
            else:
                gated = op.name in GATED and not self._float_gate(op.inputs[0])
                gate = self._fixed(f'{self._site_name(op)}/{GATED[op.name]}') if gated else None
                observes = name == self._site_name(op) and self._entry(name).range is None
                self.structure.sites.append(Site(*op.place, name, gate, observes).to_dict())

        known = {op.place for op in found}
        for op in graph.operations:
            # with gradients it must not overwrite what a quantizer returned
            if (
                op.in_place
                and not op.overwrites
                and op.place not in known
                and graph.reads_values(op.outputs[0])
                and graph.come_from_layers(op.inputs[:1])
            ):
                self.structure.sites.append(Site(*op.place, None).to_dict())

    def _one_scale_where_others_read(self) -> None:
        """A scale per channel is for depthwise convolutions alone; whoever else reads the tensor takes part in one."""
        graph = self.graph
        for key in list(graph.readers):
            for name in graph.depthwise_names(key):
                if not graph.others_read(key) or graph.origin(key) is None:
                    continue
                if name in self.scales.own:
                    self.left_float.append(graph.origin(key))
                elif (shared := graph.input_names.get(key, name)) != name:
                    self._merge(name, shared)
                else:
                    give_one_scale(self._entry(name))

    def _merge(self, name: str, into: str) -> None:
        """Gives the readers of one quantizer another one, which quantizes the same tensor."""
        for layer in self.structure.layers:
            layer.inputs = [into if known == name else known for known in layer.inputs]
        self._entry(into).readers += self.structure.activations.pop(name).readers

    def _one_zero_point_where_layers_write(self, found: list[Operation]) -> None:
        """A layer absorbs the scales of what it writes; its kernel adds one zero point for all channels."""
        for op in found:
            name = self.graph.input_names.get(op.outputs[0]) if op.kind == LAYER else None
            if name is not None and self._entry(name).spec.get('num_channels') is not None:
                give_one_zero_point(self._entry(name))

    def name_of(self, op: Operation) -> str:
        """The quantizer of what an operation computes."""
        key = op.outputs[0]
        if key not in self.names:
            name = self.graph.input_names.get(key)
            if name is None and (name := self._moved_into(key)) is not None:
                entry = self._entry(name)
                entry.moved = entry.moved or entry.spec.get('num_channels') is None
            self.names[key] = self._own(op) if name is None else name
        return self.names[key]

    def _own(self, op: Operation) -> str:
        """A quantizer of its own for what an operation computes."""
        if op.kind != LAYER:
            name = self._site_name(op)
        else:
            name = output_name(op.name, op.place[1] if len(self.graph.layers[op.name].inputs) > 1 else None)
        return self._fixed(name) if op.name in GATES else self._new(name, self._channels(op))

    def _moved_into(self, key: Key) -> str | None:
        """The quantizer of the one tensor into which a tensor's values are moved, if nobody else computes with them."""
        found: set[str] = set()
        if not self._follow(key, True, found) or len(found) != 1:
            return None
        name = found.pop()
        few_bits = self._entry(name).spec['bits'] < BITS
        return None if few_bits and self.graph.read_by_others(key, name) else name

    def _follow(self, key: Key, same_channels: bool, found: set[str]) -> bool:
        for reader in self.graph.reads_values(key):
            if reader.kind == UNKNOWN:
                continue
            if reader.kind != MOVEMENT:
                return False
            same = same_channels and keeps_channels(reader.name)
            for out in reader.outputs:
                if not self.graph.becomes_integers(out):
                    continue
                name = self.graph.input_names.get(out)
                if name is None and reader.joins:
                    name = self.name_of(reader)
                if name is None:
                    if not self._follow(out, same, found):
                        return False
                elif not same and self._entry(name).spec.get('num_channels') is not None:
                    return False
                else:
                    found.add(name)
        return True

    def _site_name(self, op: Operation) -> str:
        module, call, name, index = op.place
        return result_name(module, name, index, call if self.calls[module] > 1 else None)

    def float_gates(self) -> list[dict]:
        """The activation functions that compute in float, as islands are told."""
        own = 'its readers have quantizers of their own'
        found = []
        for op in self.graph.operations:
            if (op.name in FUNCTIONS or op.name in GATES) and op.inputs and self._float_gate(op.inputs[0]):
                summed = self._ends_in_float(self.graph.producer[op.inputs[0]])
                reason = 'a matrix product hands it floats' if summed else 'its input has a scale per channel'
                found.append(dict(module=op.place[0], operation=op.name, reason=reason))
        left = [op for op in self.left_float if op.kind != LAYER]
        return found + [dict(module=op.place[0], operation=op.name, reason=own) for op in left]

    def _entry(self, name: str) -> ActivationStructure:
        return self.structure.activations[name]

    def _channels(self, op: Operation) -> dict:
        """A scale per channel where only float operations read it; the layer's own scales per channel absorb it."""
        if op.kind != LAYER or not (
            op.name in self.outputs or self._float_gate(op.outputs[0]) or self._only_normed(op.outputs[0])
        ):
            return {}
        module = self.graph.modules[op.name]
        return channel_format(self.spec, out_channels(module), channel_axis(module))

    def _is_float_gate(self, op: Operation) -> bool:
        return op.name in GATES and self._float_gate(op.inputs[0])

    def _float_gate(self, key: Key) -> bool:
        """Whether a tensor keeps a scale per channel until a function, which then computes in float."""
        maker = self.graph.producer.get(key)
        return (
            maker is not None
            and maker.kind == LAYER
            and maker.name in self.scales.gated
            and self.graph.between(maker)
            and self.graph.only_gated(key)
        )

    def _ends_in_float(self, op: Operation) -> bool:
        """Whether a matrix product hands its sums on as floats, for a function that computes in float."""
        return op.kind == LAYER and self._float_gate(op.outputs[0]) and is_pointwise(self.graph.modules[op.name])

    def _only_normed(self, key: Key) -> bool:
        """Whether nothing but normalisations read a tensor: they compute in float, and give each channel its gain."""
        readers = self.graph.readers[key]
        return bool(readers) and all(op.kind == UNKNOWN and op.name in NORMS for op in readers)

    def _new(self, name: str, channels: dict) -> str:
        spec = build_quantizer({**self.spec, **channels}).spec()
        self.structure.activations[name] = ActivationStructure(spec, 0, self.observer)
        return name

    def _fixed(self, name: str) -> str:
        self.structure.activations[name] = ActivationStructure(dict(self.gate_spec), 0, self.observer, [0.0, 1.0])
        return name


def plan_dataflow(
    detector: nn.Module,
    structure: Structure,
    cfg: PTQConfig,
    run: Callable[[], Any],
    outputs: Iterable[str],
    weigh: Weigh,
) -> None:
    """Adds quantizers between the layers to a structure that is about to be applied.

    Args:
        detector: The float detector with its normalisations folded, in eval mode.
        structure: Its structure with quantized weights and inputs, changed in place.
        cfg: The ``ptq`` block.
        run: Calls the detector on one image with ``mode='predict'``.
        outputs: Layers that write the heads' outputs: matrix products in float, others with a scale per channel.
        weigh: Runs it on more images and tells which values matter.
    """
    recorder, outputs = record_operations(detector, run), frozenset(outputs)
    multiplied = cfg.products == 'integer' and not cfg.activations.float
    graph = DataflowGraph(recorder, structure, outputs, dict(detector.named_modules()), multiplied)
    calls = dict(recorder.frames.calls)
    if cfg.dataflow is not None:
        _plan_between(detector, structure, cfg, outputs, graph, calls, weigh)
    plan_products(structure, graph, cfg, calls)
    places = [*structure.sites, *structure.products]
    counted = set().union(*(recorder.called[place['function']] for place in places))
    structure.module_calls = {module: calls[module] for module in sorted(counted)}


def _plan_between(
    detector: nn.Module,
    structure: Structure,
    cfg: PTQConfig,
    outputs: frozenset[str],
    graph: DataflowGraph,
    calls: dict[str, int],
    weigh: Weigh,
) -> None:
    scales = choose_scales(
        detector, structure, cfg.dataflow, weigh, graph.gated_layers(), graph.may_stay_float(), graph.alone()
    )
    planner = _Planner(graph, structure, cfg, calls, outputs, scales)
    planner.plan()
    islands = planner.float_gates() + graph.islands()
    structure.islands = list({(i['module'], i['operation']): i for i in islands}.values())
    operations = sum(site['activation'] is not None for site in structure.sites)
    layers = sum(any(layer.outputs) for layer in structure.layers)
    print_log(f'{operations} operations between the layers and the outputs of {layers} layers are quantized', 'current')
    groups = defaultdict(list)
    for island in structure.islands:
        groups[island['operation'], island['reason']].append(island['module'] or '(the detector itself)')
    for (operation, reason), places in groups.items():
        print_log(f'operation {operation} stays float, {reason}: {", ".join(places)}', 'current')
