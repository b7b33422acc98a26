"""One unit against its float self: rounding, weights and scales that give back what the float unit returned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdet_ptq.calibration.reconstruction.closed_form import solve_unit
from mmdet_ptq.calibration.reconstruction.scale_search import search_scales
from mmdet_ptq.calibration.reconstruction.unit_data import UnitData
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.weights import float_weight

LOOKS = 4  # how often a unit's held-out error is looked at while it is trained
# AdaRound (Nagel et al., ICML 2020): weight of its regularizer, the share of the iterations without it, and its
# exponent from then to the end
REGULARIZER, WARMUP, BETA = 0.01, 0.2, (20, 2)


@dataclass
class UnitResult:
    """What reconstruction did to a unit.

    Attributes:
        name: The unit.
        before: Held-out error before, as a share of the output's variance.
        after: The same after.
        outcome: ``'trained'``; ``'restored'`` where training did not help and the state before came back;
            ``'diverged'`` where it came to no finite loss and the best state before that is kept; or ``'good enough'``
            where nothing was trained.
        seconds: Time it took.
    """

    name: str
    before: float
    after: float
    outcome: str = 'trained'
    seconds: float = 0.0


class UnitTrainer:
    """Reconstructs one unit.

    Args:
        data: The unit with its cached inputs and targets.
        taken: Activation quantizers that an earlier unit has trained; they stay as they are.
    """

    def __init__(self, data: UnitData, taken: set[str]) -> None:
        self.data, self.cfg, self.state = data, data.cfg, data.state
        self.diverged = False
        names = {name for hook in self.state.hooks if hook.layer in data.unit.layers for name in hook.names if name}
        self.activations = {name: self.state.activations[name] for name in sorted(names - taken)}

    def run(self, seed: int) -> UnitResult:
        """Trains the unit and leaves it in its best state.

        Args:
            seed: Seed of the order of the samples and of the dropped quantization.

        Raises:
            PTQError: The unit has no finite error, neither before nor after.
        """
        before = self.data.held_out_error()
        if before < self.cfg.skip_below:
            return UnitResult(self.data.unit.name, before, before, outcome='good enough')
        best, best_error = self.snapshot(), before
        with torch.random.fork_rng(devices=devices_of(self.data.streams.device)):
            torch.manual_seed(seed)
            if self.cfg.search_scales:
                search_scales(self.data, self.activations.values())
            if self.cfg.compensate:
                solve_unit(self.data)
            if self.cfg.search_scales or self.cfg.compensate:
                error = self.data.held_out_error()
                if error < best_error:
                    best, best_error = self.snapshot(), error
                else:
                    self.restore(best)
            for error in self._train() if self.cfg.iters else ():
                if error < best_error:
                    best, best_error = self.snapshot(), error
        self.restore(best)
        if math.isinf(best_error):
            raise PTQError(
                f'the quantized unit {self.data.unit.name} has no finite error: NaN or infinity is among '
                'its inputs or outputs, and its reconstruction does not mend that; give its layers, or '
                'those before it, more bits, or leave them in float.'
            )
        if best_error < before and self.cfg.rounding == 'latent':
            for name, weight in self.data.weights.items():
                weight.settle(float_weight(self.data.layers[name]))
        outcome = 'restored' if best_error >= before else 'diverged' if self.diverged else 'trained'
        return UnitResult(self.data.unit.name, before, best_error, outcome)

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the unit's tensors and of its activation quantizers."""
        parts = {'unit': self.data.module, **{f'activation {n}': q for n, q in self.activations.items()}}
        return {
            name: {key: value.detach().clone() for key, value in part.state_dict().items()}
            for name, part in parts.items()
        }

    def restore(self, snapshot: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of :meth:`snapshot`."""
        self.data.module.load_state_dict(snapshot['unit'])
        for name, quantizer in self.activations.items():
            quantizer.load_state_dict(snapshot[f'activation {name}'])

    def _train(self) -> Iterator[float]:
        """Trains; yields the held-out error wherever the unit is in a state that could be kept."""
        cfg = self.cfg
        learned = cfg.rounding == 'adaround'
        groups, schedules = self._groups()
        if not groups:
            return
        optimizer = torch.optim.Adam(groups)
        try:
            for step in range(cfg.iters):
                progress = step / cfg.iters
                for group, annealed in zip(optimizer.param_groups, schedules, strict=True):
                    if annealed:
                        group['lr'] = group['start'] * 0.5 * (1 + math.cos(math.pi * progress))
                optimizer.zero_grad(set_to_none=True)
                loss = self._loss(progress)
                if not torch.isfinite(loss):
                    self.diverged = True
                    break
                loss.backward()
                optimizer.step()
                if not learned and (step + 1) % max(1, cfg.iters // LOOKS) == 0:
                    yield self.data.held_out_error()
        finally:
            self.state.drop = 0.0
            for name, weight in self.data.weights.items():
                if weight.rounding is not None:
                    weight.settle_rounding(float_weight(self.data.layers[name]))
        if learned:
            yield self.data.held_out_error()

    def _groups(self) -> tuple[list[dict], list[bool]]:
        """Parameter groups, and which of them follow the cosine."""
        cfg, groups, annealed = self.cfg, [], []

        def add(parameter: nn.Parameter, lr: float, anneal: bool) -> None:
            parameter.requires_grad_(lr > 0)
            if lr > 0:
                groups.append(dict(params=[parameter], lr=lr, start=lr))
                annealed.append(anneal)

        self.data.streams.detector.requires_grad_(False)
        for name, weight in self.data.weights.items():
            original = float_weight(self.data.layers[name])
            if cfg.rounding == 'adaround':
                add(weight.learn_rounding(original).v, cfg.rounding_lr, False)
            elif cfg.rounding == 'latent':
                add(original, cfg.weight_lr * weight.step_size(), True)
            for parameter in weight.quantizer.learnable().values():
                add(parameter, cfg.weight_scale_lr * _size(parameter), True)
            bias = getattr(self.data.layers[name], 'bias', None)
            if isinstance(bias, nn.Parameter):
                add(bias, cfg.bias_lr * max(_size(bias), 1e-2), True)
        for quantizer in self.activations.values():
            for parameter in quantizer.learnable().values():
                add(parameter, cfg.activation_lr * _size(parameter), True)
        return groups, annealed

    def _loss(self, progress: float) -> Tensor:
        cfg = self.cfg
        chosen = torch.randint(len(self.data.train_samples), (self.data.batch_size,)).tolist()
        self.state.drop = cfg.drop
        parts = list(self.data.errors([self.data.train_samples[i] for i in chosen], mix=cfg.input_drop > 0))
        loss = sum(error for error, _ in parts) / sum(numel for _, numel in parts)
        self.state.drop = 0.0
        if cfg.rounding == 'adaround' and progress >= WARMUP:
            beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - progress) / (1 - WARMUP)
            # the published weight is one against squared errors summed over the channels
            loss = loss + REGULARIZER / self.data.energy * sum(
                weight.rounding.regularizer(beta) for weight in self.data.weights.values()
            )
        return loss


def _size(parameter: Tensor) -> float:
    return float(parameter.detach().abs().mean())


def devices_of(device: torch.device) -> list[torch.device]:
    """The devices other than the CPU whose random state ``torch.random.fork_rng`` has to keep."""
    return [] if device.type == 'cpu' else [device]
