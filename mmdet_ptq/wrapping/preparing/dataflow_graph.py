"""Where the tensors of a forward pass come from and where they lead: what lies between quantized layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container

from torch import nn

from mmdet_ptq.wrapping.structure import LayerStructure, Structure
from mmdet_ptq.wrapping.watching.channel_costs import BITS
from mmdet_ptq.wrapping.watching.layers import is_depthwise, is_pointwise
from mmdet_ptq.wrapping.watching.operations import (
    ARITHMETIC,
    FUNCTIONS,
    GATES,
    LAYER,
    MOVEMENT,
    PRODUCTS,
    UNKNOWN,
    fuses_clip,
)
from mmdet_ptq.wrapping.watching.recorder import Key, Operation, Recorder


class DataflowGraph:
    """What stands before and behind each tensor of a forward pass.

    Args:
        recorder: The pass.
        structure: The detector's structure with quantized weights and inputs.
        outputs: Layers that write the heads' outputs.
        modules: The detector's modules by name.
        multiplied: Whether products of activations are quantized where they read.
    """

    def __init__(
        self,
        recorder: Recorder,
        structure: Structure,
        outputs: Container[str],
        modules: dict[str, nn.Module],
        multiplied: bool,
    ) -> None:
        self.operations = recorder.operations
        self.readers: dict[Key, list[Operation]] = defaultdict(list)
        self.producer: dict[Key, Operation] = {}
        self.layers = {layer.name: layer for layer in structure.layers}
        self.outputs = outputs
        self.modules = modules
        for op in self.operations:
            for key in dict.fromkeys(op.inputs):
                self.readers[key].append(op)
            for key in op.outputs:
                self.producer.setdefault(key, op)
        # behind and in front of quantized layers, by known operations alone or by any
        self._comes, self._comes_anyhow = self._behind_layers(known=True), self._behind_layers(known=False)
        self._leads, self._leads_anyhow = self._before_layers(known=True), self._before_layers(known=False)
        self.products = [op for op in self.operations if multiplied and self._is_product(op)]
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

    def _is_product(self, op: Operation) -> bool:
        """Whether an operation multiplies two matrices that layers compute, for other layers, among integers.

        Of the 7 bits of a right factor 6 would be left where it is never negative: a softmax there, as in GCNet's
        pooling, stays float.
        """
        return (
            op.macs > 0
            and op.pair
            and all(self.come_from_layers([key]) for key in op.inputs)
            and self.lead_to_layers(op.outputs)
            and not self.is_positive(op.inputs[1])
            and not self._is_among_float_layers(op.place[0])
        )

    def _is_among_float_layers(self, module: str) -> bool:
        layers = self._layers_around(module)
        return bool(layers) and not any(layer.integer for layer in layers)

    def _layers_around(self, module: str) -> list[LayerStructure]:
        """The layers of a module, or of the next one around it that has any."""
        while module:
            layers = [layer for layer in self.layers.values() if layer.name.startswith(f'{module}.')]
            if layers:
                return layers
            module = module.rpartition('.')[0]
        return []

    def product_bits(self, op: Operation) -> int:
        """The bits of a product's factors: the most that a layer beside it reads, at least 8."""
        names = {name for layer in self._layers_around(op.place[0]) if layer.integer for name in layer.inputs}
        return max([BITS, *(self.entries[name].spec['bits'] for name in names)])

    def is_positive(self, key: Key) -> bool:
        """Whether no value of a tensor is below zero, as the operation tells that computes it."""
        maker = self.producer.get(key)
        if maker is None or maker.kind != MOVEMENT:
            return maker is not None and maker.positive
        return bool(maker.inputs) and all(self.is_positive(source) for source in set(maker.inputs) - {key})

    def read_in_float(self, key: Key) -> bool:
        """Whether nothing reads a tensor as it would be quantized where it is computed, be it through movements."""
        return all(
            all(self.read_in_float(out) for out in op.outputs) and not self.between(op)
            if op.kind == MOVEMENT
            else self.input_of(op) is None
            if op.kind == LAYER
            else not self.between(op)
            for op in self.readers[key]
        )

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
            leads = self.lead_to_layers(op.outputs) and not self._ends_in_float(op)
            return self.made_of_integers(key) and leads or self.writes_output(op)
        return (op.kind == ARITHMETIC or op.joins) and self.made_of_integers(key) and self.becomes_integers(key)

    def _ends_in_float(self, op: Operation) -> bool:
        """Whether a linear layer ends in float, as kernels of matrix products can, for float operations alone read it.

        Products of activations are among these: they round what they read by themselves.
        """
        return isinstance(self.modules[op.name], nn.Linear) and self.read_in_float(op.outputs[0])

    def writes_output(self, op: Operation) -> bool:
        """Whether a quantized layer writes an output of the heads in few bits; products of matrices end in float."""
        return (
            op.kind == LAYER
            and op.name in self.outputs
            and self.input_of(op) is not None
            and not is_pointwise(self.modules[op.name])
        )

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
        """Whether only functions of each value read a tensor, SiLU perhaps written as a product with its sigmoid."""
        gates = {out for op in self.readers[key] if op.name in GATES for out in op.outputs}
        return (
            bool(self.readers[key])
            and all(
                op.name in FUNCTIONS or op.name in GATES or op.name in PRODUCTS and gates.intersection(op.inputs)
                for op in self.readers[key]
            )
            and (not gates or any(op.name in PRODUCTS for op in self.readers[key]))
        )

    def gated_layers(self) -> set[str]:
        """The layers whose output lies between quantized layers and is read by functions of each value alone."""
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

    def may_stay_float(self) -> set[str]:
        """Inputs of depthwise convolutions whose tensor others read, too, and that one operation computes."""
        return {
            name
            for key in self.readers
            for name in self.depthwise_names(key)
            if self.others_read(key) and self._computes_alone(self.origin(key))
        }

    def alone(self) -> set[str]:
        """Inputs of depthwise convolutions that nobody else reads, and that no layer writes, perhaps through a ReLU.

        Layers take the scales over.
        """
        return {
            name
            for key in self.readers
            for name in self.depthwise_names(key)
            if not self.others_read(key) and not self._is_of_layer(self.origin(key))
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

    def others_read(self, key: Key) -> bool:
        """Whether anything but depthwise convolutions computes with a tensor."""
        return any(op.kind != LAYER or not is_depthwise(self.modules[op.name]) for op in self.reads_values(key))

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
