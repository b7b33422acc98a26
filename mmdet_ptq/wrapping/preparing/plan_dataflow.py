"""Which tensors between the layers are quantized, found from one float forward pass.

The pass is watched operation by operation (:mod:`mmdet_ptq.wrapping.watching.recorder`); what is found there is written
into the structure, from which :mod:`mmdet_ptq.wrapping.flow` rebuilds it without running the detector.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from typing import Any

from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.quantizers import build_quantizer
from mmdet_ptq.wrapping.flow import Site
from mmdet_ptq.wrapping.names import output_name, result_name
from mmdet_ptq.wrapping.preparing.choose_scales import Scales, choose_scales, give_one_scale, give_one_zero_point
from mmdet_ptq.wrapping.structure import ActivationStructure, Structure
from mmdet_ptq.wrapping.watching.channel_costs import Weigh
from mmdet_ptq.wrapping.watching.layers import channel_axis, channel_format, is_depthwise, out_channels
from mmdet_ptq.wrapping.watching.operations import (
    ARITHMETIC,
    GATED,
    GATES,
    LAYER,
    MOVEMENT,
    NORMS,
    PRODUCTS,
    UNKNOWN,
    fuses_clip,
    keeps_channels,
)
from mmdet_ptq.wrapping.watching.recorder import Key, Operation, Recorder, record_operations

BITS = 8  # of a tensor that no layer reads, at least


class _Graph:
    """Where tensors come from and where they lead."""

    def __init__(self, recorder: Recorder, structure: Structure, outputs: Container[str]) -> None:
        self.operations = recorder.operations
        self.readers: dict[Key, list[Operation]] = defaultdict(list)
        self.producer: dict[Key, Operation] = {}
        self.layers = {layer.name: layer for layer in structure.layers}
        self.outputs = outputs
        for op in self.operations:
            for key in dict.fromkeys(op.inputs):
                self.readers[key].append(op)
            for key in op.outputs:
                self.producer.setdefault(key, op)
        # behind and in front of quantized layers, by known operations alone or by any
        self._comes, self._comes_anyhow = self._behind_layers(known=True), self._behind_layers(known=False)
        self._leads, self._leads_anyhow = self._before_layers(known=True), self._before_layers(known=False)
        self.entries = structure.activations
        # where depthwise convolutions have a quantizer of their own, the tensor's is that of the other layers
        own = [op for op in self.operations if self._is_of_the_tensor(op, structure)]
        own.sort(key=lambda op: self.entries[self.input_of(op)].spec.get('num_channels') is None)
        self.input_names = {op.inputs[0]: self.input_of(op) for op in own}

    def _behind_layers(self, known: bool) -> set[Key]:
        """Tensors that are computed from what quantized layers write; the head's outputs are not followed further."""
        found: set[Key] = set()
        for op in self.operations:
            if op.kind == LAYER:
                reached = self.input_of(op) is not None and op.name not in self.outputs
            else:
                reached = not (known and op.kind == UNKNOWN) and found.intersection(op.inputs)
            if reached:
                found.update(op.outputs)
        return found

    def _before_layers(self, known: bool) -> set[Key]:
        """Tensors that quantized layers read, or something that is computed from them."""
        found: set[Key] = set()
        for op in reversed(self.operations):
            if op.kind == LAYER:
                reached = self.input_of(op) is not None
            else:
                reached = not (known and op.kind == UNKNOWN) and found.intersection(op.outputs)
            if reached:
                found.update(op.inputs)
        return found

    def made_of_integers(self, key: Key) -> bool:
        """Whether known operations alone stand between quantized layers and a tensor."""
        return key in self._comes

    def becomes_integers(self, key: Key) -> bool:
        """Whether known operations alone stand between a tensor and a quantized layer."""
        return key in self._leads

    def come_from_layers(self, keys: list[Key]) -> bool:
        """Whether any of some tensors is computed from what quantized layers write, by whatever operations."""
        return not self._comes_anyhow.isdisjoint(keys)

    def lead_to_layers(self, keys: list[Key]) -> bool:
        """Whether quantized layers read what is computed from any of some tensors, by whatever operations."""
        return not self._leads_anyhow.isdisjoint(keys)

    def _is_of_the_tensor(self, op: Operation, structure: Structure) -> bool:
        """Whether the quantizer of a layer's input is the tensor's own, for all readers; else that gets another one."""
        name = self.input_of(op)
        if name is None or (entry := structure.activations[name]).divided:
            return False
        return entry.spec['bits'] >= BITS or not self.read_by_others(op.inputs[0], name)

    def read_by_others(self, key: Key, name: str) -> bool:
        """Whether anything but layers whose input has this quantizer reads a tensor, be it through movements."""
        return any(
            any(self.read_by_others(out, name) for out in op.outputs)
            if op.kind == MOVEMENT
            else self.input_of(op) != name
            for op in self.readers[key]
        )

    def input_of(self, op: Operation) -> str | None:
        """Activation name of a layer call's input; None for other operations and for what stays float."""
        if op.kind != LAYER or not op.inputs:
            return None
        layer = self.layers.get(op.name)
        integer = layer is not None and layer.weight is not None and len(layer.inputs) > op.place[1]
        return layer.inputs[op.place[1]] if integer else None

    def between(self, op: Operation) -> bool:
        """Whether an operation's result lies between quantized layers and is to be quantized where it is computed."""
        if len(op.outputs) != 1:
            return False
        key = op.outputs[0]
        if any(reader.overwrites and reader.inputs[0] == key for reader in self.readers[key]):
            return False
        if op.kind == LAYER:
            return self.made_of_integers(key) and self.lead_to_layers(op.outputs) or self.writes_output(op)
        return (op.kind == ARITHMETIC or op.joins) and self.made_of_integers(key) and self.becomes_integers(key)

    def writes_output(self, op: Operation) -> bool:
        """Whether a quantized layer writes an output of the heads."""
        return op.kind == LAYER and op.name in self.outputs and self.input_of(op) is not None

    def reads_values(self, key: Key) -> list[Operation]:
        """The operations through which a tensor leads to a quantized layer."""
        return [
            op
            for op in self.readers[key]
            if self.input_of(op) is not None or self.lead_to_layers(op.outputs) and op.kind != LAYER
        ]

    def fused(self, op: Operation) -> bool:
        """Whether runtimes compute the operation and the only one that reads its result in one."""
        if op.kind != LAYER and not (op.kind == ARITHMETIC and fuses_clip(op.name)):
            return False
        readers = self.readers[op.outputs[0]]
        return len(readers) == 1 and readers[0].clips and self.between(readers[0])

    def only_gated(self, key: Key) -> bool:
        """Whether nothing but SiLU or HardSwish reads a tensor, be it written as a product with its sigmoid."""
        gates = {out for op in self.readers[key] if op.name in GATES for out in op.outputs}
        return (
            bool(self.readers[key])
            and all(
                op.name in GATED or op.name in GATES or op.name in PRODUCTS and gates.intersection(op.inputs)
                for op in self.readers[key]
            )
            and (not gates or any(op.name in PRODUCTS for op in self.readers[key]))
        )

    def gated_layers(self) -> set[str]:
        """The layers whose output lies between quantized layers and is read by nothing but SiLU or HardSwish."""
        return {
            op.name
            for op in self.operations
            if op.kind == LAYER and self.between(op) and op.name not in self.outputs and self.only_gated(op.outputs[0])
        }

    def origin(self, key: Key) -> Operation | None:
        """The operation that computes or joins a tensor's values, before they are moved; None outside of integers."""
        maker = self.producer.get(key)
        while maker is not None and maker.kind == MOVEMENT and not maker.joins:
            maker = self.producer.get(maker.inputs[0]) if maker.inputs else None
        return maker if maker is not None and self.between(maker) else None

    def depthwise_names(self, key: Key) -> set[str]:
        """The quantizers per channel of the layers that read a tensor; with few bits they are nobody else's anyway."""
        specs = {name: self.entries[name].spec for op in self.readers[key] if (name := self.input_of(op))}
        return {name for name, spec in specs.items() if spec.get('num_channels') is not None and spec['bits'] >= BITS}

    def may_stay_float(self, modules: dict[str, nn.Module]) -> set[str]:
        """Inputs of depthwise convolutions whose tensor others read, too, and that one operation computes."""
        return {
            name
            for key in self.readers
            for name in self.depthwise_names(key)
            if self.others_read(key, modules) and self._computes_alone(self.origin(key))
        }

    def alone(self, modules: dict[str, nn.Module]) -> set[str]:
        """Inputs of depthwise convolutions that nobody else reads, and that no layer writes, perhaps through a ReLU.

        Layers take the scales over.
        """
        return {
            name
            for key in self.readers
            for name in self.depthwise_names(key)
            if not self.others_read(key, modules) and not self._is_of_layer(self.origin(key))
        }

    def _is_of_layer(self, op: Operation | None) -> bool:
        maker = self.producer.get(op.inputs[0]) if op is not None and op.clips else op
        return maker is not None and maker.kind == LAYER and (maker is op or self.fused(maker))

    def _computes_alone(self, op: Operation | None) -> bool:
        """Whether an operation may put out floats: no layer needs its result quantized to compute in integers."""
        if op is None or op.kind == LAYER or op.joins:
            return False
        makers = (self.producer.get(key) for key in op.inputs)
        return not any(maker is not None and self.between(maker) and self.fused(maker) for maker in makers)

    def others_read(self, key: Key, modules: dict[str, nn.Module]) -> bool:
        """Whether anything but depthwise convolutions computes with a tensor."""
        return any(op.kind != LAYER or not is_depthwise(modules[op.name]) for op in self.reads_values(key))

    def islands(self) -> list[dict]:
        """Operations between quantized layers that stay float."""
        found: dict[tuple[str, str], dict] = {}
        for op in self.operations:
            if op.kind in (LAYER, MOVEMENT) or not (
                self.come_from_layers(op.inputs) and self.lead_to_layers(op.outputs)
            ):
                continue
            if op.overwrites:
                reason = 'it changes a tensor in place that is read under its old name'
            elif op.kind == UNKNOWN:
                reason = 'no 8-bit form of it is known'
            elif self.between(op):
                continue
            else:
                behind = any(map(self.becomes_integers, op.outputs))
                reason = 'float operations stand before it' if behind else 'only float operations read it'
            found.setdefault((op.place[0], op.name), dict(module=op.place[0], operation=op.name, reason=reason))
        return list(found.values())


class _Planner:
    """Gives every tensor between quantized layers its quantizer."""

    def __init__(
        self,
        graph: _Graph,
        structure: Structure,
        cfg: PTQConfig,
        modules: dict[str, nn.Module],
        calls: dict[str, int],
        outputs: frozenset[str],
        scales: Scales,
    ) -> None:
        self.graph, self.structure, self.modules, self.calls = graph, structure, modules, calls
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
            if graph.between(op) and not graph.fused(op) and not self._is_float_gate(op) and op not in self.left_float
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
                if not graph.others_read(key, self.modules) or graph.origin(key) is None:
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
        """The gated activations that compute in float, as islands are told."""
        reason = 'its input has a scale per channel'
        own = 'its readers have quantizers of their own'
        return [
            dict(module=op.place[0], operation=op.name, reason=reason)
            for op in self.graph.operations
            if (op.name in GATED or op.name in GATES) and op.inputs and self._float_gate(op.inputs[0])
        ] + [dict(module=op.place[0], operation=op.name, reason=own) for op in self.left_float if op.kind != LAYER]

    def _entry(self, name: str) -> ActivationStructure:
        return self.structure.activations[name]

    def _channels(self, op: Operation) -> dict:
        """A scale per channel where only float operations read it; the layer's own scales per channel absorb it."""
        if op.kind != LAYER or not (
            op.name in self.outputs or self._float_gate(op.outputs[0]) or self._only_normed(op.outputs[0])
        ):
            return {}
        module = self.modules[op.name]
        return channel_format(self.spec, out_channels(module), channel_axis(module))

    def _is_float_gate(self, op: Operation) -> bool:
        return op.name in GATES and self._float_gate(op.inputs[0])

    def _float_gate(self, key: Key) -> bool:
        """Whether a tensor keeps a scale per channel until a SiLU or HardSwish, which then computes in float."""
        maker = self.graph.producer.get(key)
        return (
            maker is not None
            and maker.kind == LAYER
            and maker.name in self.scales.gated
            and self.graph.between(maker)
            and self.graph.only_gated(key)
        )

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
        outputs: Layers that write the heads' outputs, quantized with a scale per channel.
        weigh: Runs it on more images and tells which values matter.
    """
    recorder, outputs = record_operations(detector, run), frozenset(outputs)
    graph = _Graph(recorder, structure, outputs)
    calls = dict(recorder.frames.calls)
    modules = dict(detector.named_modules())
    scales = choose_scales(
        detector,
        structure,
        cfg.dataflow,
        weigh,
        graph.gated_layers(),
        graph.may_stay_float(modules),
        graph.alone(modules),
    )
    planner = _Planner(graph, structure, cfg, modules, calls, outputs, scales)
    planner.plan()
    counted = set().union(*(recorder.called[site['function']] for site in structure.sites))
    structure.module_calls = {module: calls[module] for module in sorted(counted)}
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
