"""What reaches each unit: calibration batches on their way through the float and the quantized detector, unit by unit.

The detector's own forward is run again for every unit, but finished units return what they returned before, and units
and other modules that do not matter return zeros, so that each unit computes once. The float stream, which no
calibration changes, is run for several units at a time. No code of the user is traced or rewritten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmdet_ptq.calibration.reconstruction.activation_store import ActivationStore
from mmdet_ptq.calibration.reconstruction.unit_fisher import fisher_weights
from mmdet_ptq.calibration.reconstruction.units import Passage, Unit
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import AlignedPredictions, predict_aligned
from mmdet_ptq.wrapping import quantization_mode
from mmdet_ptq.wrapping.flow import running, set_unit
from mmdet_ptq.wrapping.state import STATE

FLOAT, QUANTIZED = 'float', 'quantize'


# share of the store's memory that float inputs and outputs of coming units may take
AHEAD = 0.25


class _Reached(Exception):
    """Ends a forward pass after the last call of the units in question."""


@dataclass
class KeptWeight:
    """A :class:`~.fisher.FisherWeight` whose positions are in the store.

    Attributes:
        positions: Their number.
        channels: Mean over everything else, (C,).
    """

    positions: int
    channels: Tensor


@dataclass
class Batch:
    """A preprocessed calibration batch.

    Attributes:
        inputs: Number of the (N, C, H, W) images in the store.
        samples: Meta information of the N images.
        reference: The float detector's predictions, for detectors whose second stage needs them.
        fisher: (unit, call) to how much its outputs matter, for units to come; empty where all count alike.
    """

    inputs: int
    samples: list
    reference: AlignedPredictions | None = None
    fisher: dict[tuple[str, int], KeptWeight] = field(default_factory=dict)


@dataclass
class CallInputs:
    """Arguments of one call of a unit for one batch: tensors by their number in the store, the rest as it is."""

    leaves: list[Any]
    spec: Any
    tensors: list[int]  # positions in ``leaves``

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple, dict]:
        """The arguments with given tensors."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.tensors, tensors, strict=True):
            leaves[position] = tensor
        return tree_unflatten(leaves, self.spec)


class Streams:
    """The calibration batches inside the float and the quantized detector.

    Args:
        detector: The quantized detector.
        units: Its units, in the order in which they run.
        store: Where activations are kept.
        passages: Other modules that need not run where their output does not matter. Defaults to none.
    """

    def __init__(
        self, detector: nn.Module, units: list[Unit], store: ActivationStore, passages: Iterable[Passage] = ()
    ) -> None:
        self.detector = detector
        self.state = getattr(detector, STATE)
        self.store = store
        self.units = {unit.name: unit for unit in units}
        self.passages = {passage.name: passage for passage in passages}
        self.device = next(detector.parameters()).device
        self.batches: list[Batch] = []
        self.finished: set[str] = set()
        # (stream, unit, call) -> one number per batch
        self.outputs: dict[tuple[str, str, int], list[int]] = {}
        self._shapes: list[dict[tuple[str, int], tuple[torch.Size, torch.dtype]]] = []
        # float inputs of coming units
        self._ahead: dict[str, list[list[CallInputs]]] = {}

    @torch.no_grad()
    def add(self, data: dict, keep_reference: bool, fisher: bool = False) -> None:
        """Adds a batch and learns the shape of the units' and passages' outputs from one float pass.

        Args:
            data: A preprocessed batch: ``inputs`` and ``data_samples``.
            keep_reference: Keep the float predictions as reference of later passes.
            fisher: Measure how much each output matters to the global loss. Defaults to False.
        """
        shapes: dict[tuple[str, int], tuple[torch.Size, torch.dtype]] = {}
        counts = Counter()

        def note(name: str) -> Callable:
            def hook(module, args, output):
                shapes[name, counts[name]] = output.shape, output.dtype
                counts[name] += 1

            return hook

        handles = [
            self.detector.get_submodule(name).register_forward_hook(note(name))
            for name in (*self.units, *self.passages)
        ]
        try:
            with quantization_mode(self.detector, FLOAT):
                reference = predict_aligned(self.detector, data['inputs'], data['data_samples'])
        finally:
            for handle in handles:
                handle.remove()
        self._shapes.append(shapes)
        # the proposal network's own predictions are not looked at again
        reference = replace(reference.detach(), proposal_stage=None) if keep_reference else None
        batch = Batch(self.store.put(data['inputs']), data['data_samples'], reference)
        if fisher:
            with quantization_mode(self.detector, FLOAT):
                weights = fisher_weights(self.detector, self.units.values(), data, batch.reference)
            batch.fisher = {key: KeptWeight(self.store.put(w.positions), w.channels) for key, w in weights.items()}
        self.batches.append(batch)

    def collect(self, unit: Unit, stream: str) -> list[list[CallInputs]]:
        """Runs every batch up to a unit.

        In the float stream the unit's outputs are kept, too, as what it should return.

        Args:
            unit: The next unit.
            stream: ``'float'`` or ``'quantize'``.

        Returns:
            For each call of the unit, its inputs batch by batch.
        """
        if stream != FLOAT:
            return self._replay([unit], stream)[unit.name]
        if unit.name not in self._ahead:
            self._ahead = self._replay(self._coming(unit), stream)
        return self._ahead.pop(unit.name)

    def finish(self, unit: Unit, inputs: list[list[CallInputs]]) -> None:
        """Keeps what the calibrated unit returns, and forgets what nobody will ask for again.

        Args:
            unit: The unit, in its final state.
            inputs: What :meth:`collect` returned for the quantized stream.
        """
        with torch.no_grad(), quantization_mode(self.detector, QUANTIZED):
            for call, batches in enumerate(inputs):
                kept = self.outputs[QUANTIZED, unit.name, call] = []
                for batch in batches:
                    kept.append(self.store.put(self.run(unit, call, batch, self.tensors(batch))))
        self.finished.add(unit.name)
        self.forget(inputs)
        for batch in self.batches:
            for key in [key for key in batch.fisher if key[0] == unit.name]:
                self.store.drop(batch.fisher.pop(key).positions)
        waiting = [u for u in self.units.values() if u.name not in self.finished]
        needs = [need for u in waiting for need in u.needs]
        if None in needs:
            return
        needed = set().union(*needs)
        for key in [key for key in self.outputs if key[1] in self.finished and key[1:] not in needed]:
            for number in self.outputs.pop(key):
                self.store.drop(number)

    def forget(self, inputs: list[list[CallInputs]]) -> None:
        """Drops collected inputs."""
        for batches in inputs:
            for batch in batches:
                for position in batch.tensors:
                    self.store.drop(batch.leaves[position])

    def tensors(self, inputs: CallInputs) -> list[Tensor]:
        """The input tensors of a call, on the detector's device."""
        return [self.stored(inputs.leaves[position]) for position in inputs.tensors]

    def target(self, unit: Unit, call: int, batch: int) -> Tensor:
        """What the float unit returned; do not write to it."""
        return self.store.get(self.outputs[FLOAT, unit.name, call][batch])

    def run(self, unit: Unit, call: int, inputs: CallInputs, tensors: list[Tensor]) -> Tensor:
        """Calls a unit alone, as the given call of a forward pass."""
        self.state.reset()
        set_unit(self.state, unit.name, unit.layers, call, unit.calls)
        args, kwargs = inputs.arguments(tensors)
        with running(self.state):
            return self.detector.get_submodule(unit.name)(*args, **kwargs)

    # ------------------------------------------------------------------ one pass

    def _coming(self, unit: Unit) -> list[Unit]:
        """The unit and those after it whose float inputs and outputs fit in memory, too."""
        names = list(self.units)
        coming, size = [unit], self._float_bytes(unit)
        for name in names[names.index(unit.name) + 1 :]:
            size += self._float_bytes(self.units[name])
            if size > AHEAD * self.store.limit_bytes:
                break
            coming.append(self.units[name])
        return coming

    def _float_bytes(self, unit: Unit) -> int:
        """Size of the unit's outputs and, as far as it is known, of what these are made of."""
        calls = {(unit.name, call) for call in range(unit.calls)}.union(*(need or () for need in unit.needs))
        return sum(shapes[call][0].numel() * shapes[call][1].itemsize for shapes in self._shapes for call in calls)

    def _replay(self, targets: list[Unit], stream: str) -> dict[str, list[list[CallInputs]]]:
        """Runs every batch up to the last of some units; returns the inputs of their calls, batch by batch."""
        replay = _Replay(self, targets, stream)
        with torch.no_grad(), quantization_mode(self.detector, stream), replay.installed():
            for index in range(len(self.batches)):
                replay.run(index)
        return replay.found

    def stored(self, number: int) -> Tensor:
        """A copy of what the store keeps, on the detector's device."""
        return self.store.get(number).to(self.device, copy=True)

    def zeros(self, batch: int, name: str, call: int) -> Tensor:
        """Zeros of the shape of what a call of a unit or passage returns."""
        shape, dtype = self._shapes[batch][name, call]
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def keep_inputs(self, args: tuple, kwargs: dict) -> CallInputs:
        """Puts the tensors among the arguments of a call into the store."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        return CallInputs(
            [self.store.put(leaf) if i in tensors else leaf for i, leaf in enumerate(leaves)], spec, tensors
        )

    def needed(self, targets: list[Unit]) -> set[tuple[str, int]] | None:
        """Unit calls whose true outputs the targets' inputs are made of; None if that is not known."""
        needed, todo = set(), [need for target in targets for need in target.needs]
        while todo:
            needs = todo.pop()
            if needs is None:
                return None
            for name, call in needs - needed:
                needed.add((name, call))
                if name not in self.finished:
                    todo.append(self.units[name].needs[call])
        return needed


class _Replay:
    """Batches on their way to some units, while units and passages do something else than their own forward.

    Args:
        streams: The batches.
        targets: The units that they are to reach.
        stream: ``'float'`` or ``'quantize'``.

    Attributes:
        found: Target to the inputs of its calls, batch by batch.
    """

    def __init__(self, streams: Streams, targets: list[Unit], stream: str) -> None:
        self.streams, self.targets, self.stream = streams, targets, stream
        self.found: dict[str, list[list[CallInputs]]] = {unit.name: [[] for _ in range(unit.calls)] for unit in targets}
        self.needed = streams.needed(targets)
        # as in a decoder that hands what its head found to its next layer
        self.reads_itself = self.needed is None or any(name in self.found for name, _ in self.needed)
        self.index, self.left = 0, 0  # the batch; calls of the targets that are still to come
        self.counts: Counter[str] = Counter()

    def run(self, index: int) -> None:
        """Runs a batch.

        Raises:
            PTQError: A target ran less often than it did when the batch was added.
        """
        self.index, self.left, self.counts = index, sum(unit.calls for unit in self.targets), Counter()
        streams, batch = self.streams, self.streams.batches[index]
        try:
            image = streams.stored(batch.inputs)
            predict_aligned(streams.detector, image, batch.samples, reference=batch.reference)
        except _Reached:
            streams.state.reset()
        if self.left:
            short = next(unit.name for unit in self.targets if self.counts[unit.name] < unit.calls)
            raise PTQError(
                f'the unit {short} ran less often than in the first pass; name other modules in '
                '`ptq.reconstruct.units`.'
            )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While it lasts, units and passages do what follows."""
        streams = self.streams
        policies = {name: self.as_target if name in self.found else self.as_unit for name in streams.units}
        if self.needed is not None:
            policies |= {
                name: self.as_passage
                for name in streams.passages
                if not any(target.startswith(f'{name}.') for target in self.found)
            }
        with ExitStack() as stack:
            for name, policy in policies.items():
                module = streams.detector.get_submodule(name)
                if name in streams.units:
                    # first of all hooks: inputs are kept before they are quantized
                    hook = module.register_forward_pre_hook(self._before(name), prepend=True, with_kwargs=True)
                    stack.callback(hook.remove)
                forward = self._counted(name, policy, module.forward)
                stack.enter_context(mock.patch.object(module, 'forward', forward))
            yield

    def as_target(self, name: str, call: int, compute: Callable[[], Tensor]) -> Tensor:
        """What float targets return is kept, as what they should return; with the last call of all the pass ends."""
        streams, key = self.streams, (FLOAT, name, call)
        if self.stream == FLOAT:
            output = compute()
            streams.outputs.setdefault(key, []).append(streams.store.put(output))
        elif self.reads_itself:
            output = compute()
        else:
            # nobody reads it: no later call of the unit does, and with the last one the pass ends
            output = streams.stored(streams.outputs[key][self.index])
        self.left -= 1
        if not self.left:
            raise _Reached
        return output

    def as_unit(self, name: str, call: int, compute: Callable[[], Tensor]) -> Tensor:
        """Another unit returns zeros where no target reads them, and what it returned before once it is finished."""
        if self.needed is not None and (name, call) not in self.needed:
            return self.streams.zeros(self.index, name, call)
        if name in self.streams.finished:
            return self.streams.stored(self.streams.outputs[self.stream, name, call][self.index])
        return compute()

    def as_passage(self, name: str, call: int, compute: Callable[[], Tensor]) -> Tensor:
        """A passage returns zeros where anything that it is made of is zeros."""
        made_of = self.streams.passages[name].made_of
        if call < len(made_of) and not made_of[call] <= self.needed:
            return self.streams.zeros(self.index, name, call)
        return compute()

    def _before(self, name: str) -> Callable:
        unit, streams = self.streams.units[name], self.streams

        def hook(module, args, kwargs):
            call = self.counts[name]
            set_unit(streams.state, name, unit.layers, call, unit.calls)
            if name in self.found:
                self.found[name][call].append(streams.keep_inputs(args, kwargs))

        return hook

    def _counted(self, name: str, policy: Callable, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            call = self.counts[name]
            self.counts[name] += 1
            return policy(name, call, lambda: forward(*args, **kwargs))

        return run
