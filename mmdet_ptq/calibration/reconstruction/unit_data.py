"""One reconstruction unit, its cached inputs and targets, and its error against the float unit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mmdet_ptq.calibration.reconstruction.streams import CallInputs, Streams
from mmdet_ptq.calibration.reconstruction.units import Unit
from mmdet_ptq.config import ReconstructConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.state import STATE, mixed
from mmdet_ptq.wrapping.weights import quantized_weights

TABLE_TYPES = (torch.int64, torch.int32, torch.int16)


class UnitData:
    """One unit with what reaches it and what it should return.

    Args:
        streams: The calibration batches.
        unit: The unit.
        inputs: For each call and batch the quantized detector's inputs of the unit.
        float_inputs: The float detector's.
        cfg: The ``reconstruct`` section.
        train: (batch, image) pairs to train on; image None stands for the batch as a whole.
        held_out: Those to judge by.
    """

    def __init__(
        self,
        streams: Streams,
        unit: Unit,
        inputs: list[list[CallInputs]],
        float_inputs: list[list[CallInputs]],
        cfg: ReconstructConfig,
        train: list[tuple],
        held_out: list[tuple],
    ) -> None:
        self.streams, self.unit, self.cfg = streams, unit, cfg
        self.inputs, self.float_inputs = inputs, float_inputs
        self.train_samples, self.held_out = train, held_out or train
        self.module = streams.detector.get_submodule(unit.name)
        self.weights = {
            name: weight for name, weight in quantized_weights(streams.detector).items() if name in unit.layers
        }
        self.layers = {name: streams.detector.get_submodule(name) for name in unit.layers}
        self.state = getattr(streams.detector, STATE)
        fitting = cfg.max_positions // max(self.positions(), 1)
        self.batch_size = max(1, min(cfg.batch_size, fitting, len(train)))
        self.importance = [self._importance(call) for call in range(unit.calls)] if cfg.fisher else None
        self.variances = [self._variance(call) for call in range(unit.calls)]
        self.energy = self._energy()

    def positions(self) -> int:
        """Positions of one image's outputs, over all calls."""
        targets = [self.streams.target(self.unit, call, 0) for call in range(self.unit.calls)]
        return sum(t.numel() // t.shape[self.unit.axis] // len(self.streams.batches[0].samples) for t in targets)

    @torch.no_grad()
    def held_out_error(self) -> float:
        """Mean squared error of the quantized unit on held-out samples, as a share of the output's variance.

        It is infinite where it is no finite number: whatever is finite is better.
        """
        size = self.batch_size
        total = count = 0.0
        for start in range(0, len(self.held_out), size):
            for error, numel in self.errors(self.held_out[start : start + size], mix=False):
                total += float(error)
                count += numel
        error = total / max(count, 1)
        return error if math.isfinite(error) else math.inf

    def errors(self, samples: list[tuple], mix: bool) -> Iterator[tuple[Tensor, int]]:
        """Squared errors in units of the variance, and how many values they are of, group by group."""
        for weight in self.weights.values():
            weight.set_caching(True)
        try:
            for call in range(self.unit.calls):
                for group in self._groups(call, samples):
                    tensors, target = self._gather(call, group, mix)
                    output = self.streams.run(self.unit, call, self.inputs[call][group[0][0]], tensors)
                    squares = self._weighted((output - target).square(), call, group)
                    yield squares.sum() / self.variances[call], target.numel()
        finally:
            for weight in self.weights.values():
                weight.set_caching(False)

    def _groups(self, call: int, samples: list[tuple]) -> list[list[tuple]]:
        """Samples whose tensors can be stacked."""
        groups: dict[tuple, list[tuple]] = {}
        for batch, image in samples:
            inputs = self.inputs[call][batch]
            if not self._by_image(call, batch):
                groups.setdefault(('whole', batch), [(batch, None)])
                continue
            # sizes may stand beside the tensors: windows are cut by them
            key = tuple(
                tuple(self.streams.store.get(leaf).shape[1:]) if i in inputs.tensors else leaf
                for i, leaf in enumerate(inputs.leaves)
            )
            groups.setdefault(key, []).append((batch, image))
        return list(groups.values())

    def _by_image(self, call: int, batch: int) -> bool:
        """Whether every tensor of the call has one row per image, and nothing else but sizes and switches matters.

        The unit's rows with one image tell: tables (of a transformer's map sizes) may have as many as a batch images.
        """
        inputs, images = self.inputs[call][batch], len(self.streams.batches[batch].samples)
        if set(self.unit.rows[call]) != {1}:
            return False
        others = [leaf for i, leaf in enumerate(inputs.leaves) if i not in inputs.tensors]
        if not all(leaf is None or isinstance(leaf, (bool, int, float, str)) for leaf in others):
            return False
        tensors = [self.streams.store.get(inputs.leaves[i]) for i in inputs.tensors]
        if images == 1 and any(t.dtype in TABLE_TYPES for t in tensors):
            # may be a table with one row; alone, the image is right in any case
            return False
        return all(t.ndim and len(t) == images for t in [*tensors, self.streams.target(self.unit, call, batch)])

    def _gather(self, call: int, group: list[tuple], mix: bool) -> tuple[list[Tensor], Tensor]:
        streams, device = self.streams, self.streams.device

        def rows(number_of) -> Tensor:
            parts = []
            for batch, image in group:
                tensor = streams.store.get(number_of(batch))
                parts.append(tensor if image is None else tensor[image : image + 1])
            return torch.cat(parts).to(device)

        tensors = []
        for place in range(len(self.inputs[call][group[0][0]].tensors)):

            def number(source: list[list[CallInputs]], batch: int, place: int = place) -> int:
                inputs = source[call][batch]
                return inputs.leaves[inputs.tensors[place]]

            x = rows(lambda batch: number(self.inputs, batch))
            if mix and x.is_floating_point():
                clean = rows(lambda batch: number(self.float_inputs, batch))
                x = mixed(x, clean, self.cfg.input_drop)
            tensors.append(x)
        target = torch.cat(
            [
                t if image is None else t[image : image + 1]
                for batch, image in group
                for t in [streams.target(self.unit, call, batch)]
            ]
        ).to(device)
        return tensors, target

    def _variance(self, call: int) -> float:
        """Variance of the float outputs around their channels' means, never zero."""
        total = count = 0.0
        for batch in range(len(self.inputs[call])):
            target = self.streams.target(self.unit, call, batch)
            axes = [axis for axis in range(target.ndim) if axis != self.unit.axis % target.ndim]
            total += float((target - target.mean(axes, keepdim=True)).square().sum())
            count += target.numel()
        if not math.isfinite(total):
            raise PTQError(
                f'the unit {self.unit.name} returns NaN, infinity or too large values in the float '
                'detector; leave its layers in float.'
            )
        return max(total / max(count, 1), 1e-12)

    def _energy(self) -> float:
        """Variance of the float outputs summed over their channels, mean over the calls."""
        channels = [self.streams.target(self.unit, call, 0).shape[self.unit.axis] for call in range(self.unit.calls)]
        return sum(c * v for c, v in zip(channels, self.variances, strict=True)) / self.unit.calls

    def _importance(self, call: int) -> tuple[list[Tensor], Tensor]:
        """Fisher weights of a call's outputs: positions by batch and channels, each with mean 1.

        All are 1 where no gradient of the global loss arrives: the heads of later stages, branches behind a detach.
        """
        streams, key = self.streams, (self.unit.name, call)
        positions = [streams.store.get(batch.fisher[key].positions) for batch in streams.batches]
        channels = torch.stack([batch.fisher[key].channels for batch in streams.batches]).mean(0)
        mean, channel_mean = torch.cat([p.flatten() for p in positions]).mean(), channels.mean()
        if 0 < mean < math.inf and 0 < channel_mean < math.inf:
            positions, channels = [p / mean for p in positions], channels / channel_mean
        else:
            positions, channels = [torch.ones_like(p) for p in positions], torch.ones_like(channels)
        shape = [1] * positions[0].ndim
        shape[self.unit.axis] = -1
        return [p.to(streams.device) for p in positions], channels.view(shape).to(streams.device)

    def _weighted(self, squares: Tensor, call: int, group: list[tuple]) -> Tensor:
        """Squared errors, each times how much it matters."""
        if self.importance is None:
            return squares
        by_batch, channels = self.importance[call]
        positions = torch.cat([by_batch[b] if image is None else by_batch[b][image : image + 1] for b, image in group])
        return squares * ((1 - self.cfg.fisher) + self.cfg.fisher * positions * channels)
