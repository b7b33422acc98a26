"""One unit against its float self: rounding, weights and scales that give back what the float unit returned."""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..config import ReconstructConfig
from ..errors import PTQError
from ..wrapping import quantization_mode
from ..wrapping.inputs import STATE, mixed
from ..wrapping.weights import float_weight, quantized_weights
from .compensation import LayerEquations, by_group, patches
from .streams import FLOAT, CallInputs, Streams
from .units import Unit

LOOKS = 4  # how often a unit's held-out error is looked at while it is trained


@dataclass
class UnitResult:
    """What reconstruction did to a unit.

    Attributes:
        name: The unit.
        before: Held-out error before, as a share of the output's variance.
        after: The same after.
        outcome: ``'trained'``; ``'restored'`` where training did not help and the state before came back; or
            ``'good enough'`` where nothing was trained.
        seconds: Time it took.
    """

    name: str
    before: float
    after: float
    outcome: str = 'trained'
    seconds: float = 0.0


class UnitTrainer:
    """Trains one unit.

    Args:
        streams: The calibration batches.
        unit: The unit.
        inputs: For each call and batch the quantized detector's inputs of the unit.
        float_inputs: The float detector's.
        cfg: The ``reconstruct`` section.
        train: (batch, image) pairs to train on; image None stands for the batch as a whole.
        held_out: Those to judge by.
        taken: Activation quantizers that an earlier unit has trained; they stay as they are.
    """

    def __init__(self, streams: Streams, unit: Unit, inputs: list[list[CallInputs]],
                 float_inputs: list[list[CallInputs]], cfg: ReconstructConfig, train: list[tuple],
                 held_out: list[tuple], taken: set[str]) -> None:
        self.streams, self.unit, self.cfg = streams, unit, cfg
        self.inputs, self.float_inputs = inputs, float_inputs
        self.train_samples, self.held_out = train, held_out or train
        self.module = streams.detector.get_submodule(unit.name)
        self.weights = {name: weight for name, weight in quantized_weights(streams.detector).items()
                        if name in unit.layers}
        self.layers = {name: streams.detector.get_submodule(name) for name in unit.layers}
        self.state = getattr(streams.detector, STATE)
        names = {name for hook in self.state.hooks if hook.layer in unit.layers for name in hook.names if name}
        self.activations = {name: self.state.activations[name] for name in sorted(names - taken)}
        fitting = cfg.max_positions // max(self.positions(), 1)
        self.batch_size = max(1, min(cfg.batch_size, fitting, len(train)))
        self.variances = [self._variance(call) for call in range(unit.calls)]

    def run(self, seed: int) -> UnitResult:
        """Trains the unit and leaves it in its best state.

        Args:
            seed: Seed of the order of the samples and of the dropped quantization.
        """
        before = self.held_out_error()
        if before < self.cfg.skip_below:
            return UnitResult(self.unit.name, before, before, outcome='good enough')
        best, best_error = self.snapshot(), before
        with torch.random.fork_rng(devices=_devices(self.streams.device)):
            torch.manual_seed(seed)
            if self.cfg.compensate:
                self._compensate()
                error = self.held_out_error()
                if error < best_error:
                    best, best_error = self.snapshot(), error
                else:
                    self.restore(best)
            for error in self._train() if self.cfg.iters else ():
                if error < best_error:
                    best, best_error = self.snapshot(), error
        self.restore(best)
        outcome = 'trained' if best_error < before else 'restored'
        return UnitResult(self.unit.name, before, best_error, outcome)

    def positions(self) -> int:
        """Positions of one image's outputs, over all calls."""
        targets = [self.streams.target(self.unit, call, 0) for call in range(self.unit.calls)]
        return sum(t.numel() // (t.shape[1] if t.ndim > 1 else 1) // len(self.streams.batches[0].samples)
                   for t in targets)

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the unit's tensors and of its activation quantizers."""
        parts = {'unit': self.module, **{f'activation {n}': q for n, q in self.activations.items()}}
        return {name: {key: value.detach().clone() for key, value in part.state_dict().items()}
                for name, part in parts.items()}

    def restore(self, snapshot: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of :meth:`snapshot`."""
        self.module.load_state_dict(snapshot['unit'])
        for name, quantizer in self.activations.items():
            quantizer.load_state_dict(snapshot[f'activation {name}'])

    @torch.no_grad()
    def held_out_error(self) -> float:
        """Mean squared error of the quantized unit on held-out samples, as a share of the output's variance."""
        size = self.batch_size
        total = count = 0.0
        for start in range(0, len(self.held_out), size):
            for error, numel in self._errors(self.held_out[start:start + size], mix=False):
                total += float(error)
                count += numel
        return total / max(count, 1)

    # ------------------------------------------------------------------ closed form

    @torch.no_grad()
    def _compensate(self) -> None:
        """Solves and rounds one layer after another, each with the layers before it already quantized."""
        for name, layer in self.layers.items():
            quantizer, weight = self.weights[name].quantizer, float_weight(layer)
            equations, reason = self._equations(name)
            if equations is None:
                print_log(f'{name}: {reason}, so its weights are not compensated', 'current', level=30)
                continue
            groups, rows = getattr(layer, 'groups', 1), self.weights[name].layout.to_rows(weight)
            start = rows.view(groups, -1, rows.shape[1])
            bias = layer.bias.view(groups, -1) if layer.bias is not None else start.new_zeros(start.shape[:2])
            solved, _ = equations.solve(start, bias, self.cfg.damping)
            importance = equations.importance()[:, None].expand_as(solved).reshape(rows.shape)
            quantizer.fit_weight(solved.reshape(rows.shape), importance=importance / importance.mean())
            rounded = equations.compensate(
                solved, self.cfg.damping, lambda column, q=quantizer: q(column.reshape(-1, 1)).view(column.shape))
            if not torch.isfinite(rounded).all():
                raise PTQError(f'the least squares of layer {name} have no finite solution; raise '
                               '`ptq.reconstruct.damping`.')
            weight.copy_(self.weights[name].layout.from_rows(rounded.reshape(rows.shape), weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(equations.best_bias(rounded).reshape(-1))

    def _equations(self, name: str) -> tuple[LayerEquations | None, str]:
        """The normal equations of a layer from the training samples, or why there are none."""
        layer, weight = self.layers[name], self.weights[name]
        if getattr(weight.quantizer, 'mode', '') == 'shift':
            return None, "values of the published grid are not rounded to themselves (mode 'shift')"
        equations, batches = None, sorted({batch for batch, _ in self.train_samples})
        with quantization_mode(self.streams.detector, FLOAT):
            targets = {}
            for call, batch in itertools.product(range(self.unit.calls), batches):
                seen = self._seen_by(name, call, self.float_inputs[call][batch])
                for index, (x, y) in enumerate(seen):
                    reads, y = patches(layer, x), by_group(layer, y)
                    if reads is None:
                        return None, f'a {type(layer).__name__} of this kind is not covered'
                    if equations is None:
                        rows = weight.layout.to_rows(float_weight(layer)).view(len(reads), -1, reads.shape[1])
                        again = rows @ reads
                        if layer.bias is not None:
                            again += layer.bias.view(len(reads), -1, 1)
                        if again.shape != y.shape or (again - y).abs().max() > 1e-3 * y.abs().max():
                            return None, 'its forward does more than its weight tells'
                        equations = LayerEquations(*rows.shape, layer.bias is not None, y.device)
                    picked = torch.randperm(y.shape[2], device=y.device)[:self.cfg.max_positions]
                    targets[call, batch, index] = picked, y[..., picked]
        for call, batch in itertools.product(range(self.unit.calls), batches):
            for index, (x, _) in enumerate(self._seen_by(name, call, self.inputs[call][batch])):
                picked, y = targets[call, batch, index]
                equations.add(patches(layer, x)[..., picked], y)
        return equations, ''

    def _seen_by(self, name: str, call: int, inputs: CallInputs) -> list[tuple[Tensor, Tensor]]:
        """Inputs, after their quantization, and outputs of a layer in one call of the unit."""
        seen = []
        handle = self.layers[name].register_forward_hook(lambda module, args, output: seen.append(
            (args[0].clone(), output.clone())))
        try:
            self.streams.run(self.unit, call, inputs, self.streams.tensors(inputs))
        finally:
            handle.remove()
        return seen

    # ------------------------------------------------------------------ training

    def _train(self) -> Iterator[float]:
        """Trains; yields the held-out error wherever the unit is in a state that could be kept."""
        cfg = self.cfg
        learned = cfg.rounding == 'adaround'
        optimizer, schedules = self._optimizer()
        try:
            for step in range(cfg.iters):
                progress = step / cfg.iters
                for group, annealed in zip(optimizer.param_groups, schedules, strict=True):
                    if annealed:
                        group['lr'] = group['start'] * 0.5 * (1 + math.cos(math.pi * progress))
                optimizer.zero_grad(set_to_none=True)
                loss = self._loss(progress)
                if not torch.isfinite(loss):
                    break
                loss.backward()
                optimizer.step()
                if not learned and (step + 1) % max(1, cfg.iters // LOOKS) == 0:
                    yield self.held_out_error()
        finally:
            self.state.drop = 0.0
            for name, weight in self.weights.items():
                if weight.rounding is not None:
                    weight.settle_rounding(float_weight(self.layers[name]))
        if learned:
            yield self.held_out_error()

    def _optimizer(self) -> tuple[torch.optim.Optimizer, list[bool]]:
        cfg, groups, annealed = self.cfg, [], []

        def add(parameter: nn.Parameter, lr: float, anneal: bool) -> None:
            parameter.requires_grad_(lr > 0)
            if lr > 0:
                groups.append(dict(params=[parameter], lr=lr, start=lr))
                annealed.append(anneal)

        self.streams.detector.requires_grad_(False)
        for name, weight in self.weights.items():
            original = float_weight(self.layers[name])
            if cfg.rounding == 'adaround':
                add(weight.learn_rounding(original).v, cfg.rounding_lr, False)
            elif cfg.rounding == 'latent':
                add(original, cfg.weight_lr * weight.step_size(), True)
            for parameter in weight.quantizer.learnable().values():
                add(parameter, cfg.weight_scale_lr * _size(parameter), True)
            bias = getattr(self.layers[name], 'bias', None)
            if isinstance(bias, nn.Parameter):
                add(bias, cfg.bias_lr * max(_size(bias), 1e-2), True)
        for quantizer in self.activations.values():
            for parameter in quantizer.learnable().values():
                add(parameter, cfg.activation_lr * _size(parameter), True)
        return torch.optim.Adam(groups), annealed

    def _loss(self, progress: float) -> Tensor:
        cfg = self.cfg
        chosen = torch.randint(len(self.train_samples), (self.batch_size,)).tolist()
        self.state.drop = cfg.drop
        parts = list(self._errors([self.train_samples[i] for i in chosen], mix=cfg.input_drop > 0))
        loss = sum(error for error, _ in parts) / sum(numel for _, numel in parts)
        self.state.drop = 0.0
        if cfg.rounding == 'adaround' and progress >= cfg.warmup:
            done = (progress - cfg.warmup) / (1 - cfg.warmup)
            beta = cfg.beta_end + (cfg.beta_start - cfg.beta_end) * (1 - done)
            numel = sum(weight.rounding.v.numel() for weight in self.weights.values())
            loss = loss + cfg.rounding_weight * sum(
                weight.rounding.regularizer(beta) for weight in self.weights.values()) / numel
        return loss

    def _errors(self, samples: list[tuple], mix: bool) -> Iterator[tuple[Tensor, int]]:
        """Squared errors in units of the variance, and how many values they are of, group by group."""
        for weight in self.weights.values():
            weight.set_caching(True)
        try:
            for call in range(self.unit.calls):
                for group in self._groups(call, samples):
                    tensors, target = self._gather(call, group, mix)
                    output = self.streams.run(self.unit, call, self.inputs[call][group[0][0]], tensors)
                    yield (output - target).square().sum() / self.variances[call], target.numel()
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
            shapes = tuple(self.streams.store.get(inputs.leaves[i]).shape[1:] for i in inputs.tensors)
            groups.setdefault(shapes, []).append((batch, image))
        return list(groups.values())

    def _by_image(self, call: int, batch: int) -> bool:
        """Whether every tensor of the call has one row per image."""
        inputs, images = self.inputs[call][batch], len(self.streams.batches[batch].samples)
        tensors = [self.streams.store.get(inputs.leaves[i]) for i in inputs.tensors]
        return all(t.ndim and len(t) == images for t in [*tensors, self.streams.target(self.unit, call, batch)])

    def _gather(self, call: int, group: list[tuple], mix: bool) -> tuple[list[Tensor], Tensor]:
        streams, device = self.streams, self.streams.device

        def rows(number_of) -> Tensor:
            parts = []
            for batch, image in group:
                tensor = streams.store.get(number_of(batch))
                parts.append(tensor if image is None else tensor[image:image + 1])
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
        target = torch.cat([t if image is None else t[image:image + 1] for batch, image in group
                            for t in [streams.target(self.unit, call, batch)]]).to(device)
        return tensors, target

    def _variance(self, call: int) -> float:
        """Variance of the float outputs around their channels' means, never zero."""
        total = count = 0.0
        for batch in range(len(self.inputs[call])):
            target = self.streams.target(self.unit, call, batch)
            axes = (0, *range(2, target.ndim)) if target.ndim > 2 else (0,)
            total += float((target - target.mean(axes, keepdim=True)).square().sum())
            count += target.numel()
        return max(total / max(count, 1), 1e-12)


def _size(parameter: Tensor) -> float:
    return float(parameter.detach().abs().mean())


def _devices(device: torch.device) -> list[torch.device]:
    return [] if device.type == 'cpu' else [device]
