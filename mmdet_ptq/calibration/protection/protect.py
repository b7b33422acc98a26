"""Automatic protection and mixed precision: better formats for the tensors that cost detections, under a budget."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.calibration.protection.adopt import adopt, overrides_for
from mmdet_ptq.calibration.protection.budget import Budget, Cost
from mmdet_ptq.calibration.protection.candidates import (
    Candidate,
    candidates_for,
    observe_candidates,
    present,
    put_in,
    weight_policies,
)
from mmdet_ptq.calibration.protection.damage import Damage, DamageMeter
from mmdet_ptq.calibration.protection.sensitivity import ACTIVATION, WEIGHT, TensorSet, split_kinds, tensor_sets, unread
from mmdet_ptq.config import ProtectConfig, PTQConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.progress import step, track
from mmdet_ptq.wrapping import Structure

# a change that takes off less than this share of a tensor's loss is not worth a line in the config
LEAST_GAIN = 0.25
_STAGES = ('free', 'integer', 'float')


@dataclass
class Choice:
    """One tensor set whose format was changed.

    Attributes:
        tensor: Its name, as :attr:`mmdet_ptq.calibration.protection.sensitivity.TensorSet.name`.
        kind: ``'activation'`` or ``'weight'``.
        layers: The layers that its override names.
        was: Format before.
        now: Format chosen.
        loss_before: Filtered global loss with this tensor set alone quantized, before.
        loss_after: The same afterwards.
        size_bytes: What the change adds to the integer checkpoint.
        bops: What it adds to the bit operations of one image.
        float_macs: Multiply-accumulates it takes out of the integers.
    """

    tensor: str
    kind: str
    layers: tuple[str, ...]
    was: str
    now: str
    loss_before: float
    loss_after: float
    size_bytes: int
    bops: int
    float_macs: int


@dataclass
class Protection:
    """What protection did.

    Attributes:
        overrides: Exact layer names to policies: as ``ptq.overrides`` they give the same formats again. With a
            dataflow, the tensors between the layers are then planned around them.
        choices: One entry per changed tensor set, in the order in which they were chosen.
        before: The whole quantized detector before.
        after: The same afterwards.
        size_bytes: Size of the integer checkpoint afterwards, as far as it is known.
        bops: Bit operations of one image afterwards.
        size_limit: What the budget allows for ``size_bytes``; None without a limit.
    """

    overrides: dict
    choices: list[Choice]
    before: Damage
    after: Damage
    size_bytes: int
    bops: int
    size_limit: float | None = None

    def to_dict(self) -> dict:
        """Plain dicts and lists, for ``results.json`` and a stage's state."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Protection:
        """Inverse of :meth:`to_dict`."""
        choices = [Choice(**{**choice, 'layers': tuple(choice['layers'])}) for choice in data['choices']]
        return cls(**{**data, 'choices': choices, 'before': Damage(**data['before']), 'after': Damage(**data['after'])})


@dataclass
class _Case:
    """A tensor set with the formats it may take; the chosen one is ``now``."""

    tensors: TensorSet
    start: Candidate
    now: Candidate
    candidates: list[Candidate] = field(default_factory=list)


def protect_detector(
    detector: nn.Module,
    structure: Structure,
    cfg: PTQConfig,
    images: Sequence[dict[str, Any]],
    batches: Iterable[Any],
    stored_bytes: int | None = None,
    resume_file: Path | None = None,
    weighed: Iterable[Any] | None = None,
) -> Protection:
    """Finds the tensors whose quantization costs most detections and gives them better formats, in place.

    If the detector exceeds the size or the bit operations that the budget allows, weights and activations first go to
    4 bits where that costs the least loss per saved cost. Then the most sensitive tensors are found by group testing
    (whole groups are quantized, and only the worst are split further), other formats are measured on them, and the
    change with the largest gain for its price is made until nothing is to be gained or the budget is used up. Formats
    in floating point are considered last. Without a dataflow, the result is the one that preparing and observing the
    detector anew gives with :attr:`Protection.overrides` added to ``ptq.overrides``.

    Args:
        detector: The prepared and observed detector, in eval mode; gets the chosen quantizers.
        structure: Its structure; changed with it.
        cfg: The ``ptq`` block, with ``protect``.
        images: A few calibration batches on which losses are measured, the same ones on every rank.
        batches: The calibration batches that the detector was observed on, for the ranges of other formats.
        stored_bytes: Size of the integer checkpoint as it would be written now, which a size budget is held against.
            Defaults to None, an estimate.
        resume_file: Keeps the search's measurements for an interrupted run. Defaults to None.
        weighed: See :func:`mmdet_ptq.calibration.observe_activations`. Defaults to None: ``batches``.

    Returns:
        The overrides to write into the config, and what was gained.

    Raises:
        PTQError: A limit of ``ptq.protect`` cannot be kept; the key and the least value are named.
    """
    return Protector(detector, structure, cfg, images, batches, stored_bytes, resume_file, weighed).run()


class Protector:
    """The search; formats are swapped into the detector as they are chosen and settled at the end."""

    def __init__(
        self,
        detector: nn.Module,
        structure: Structure,
        cfg: PTQConfig,
        images: Sequence[dict[str, Any]],
        batches: Iterable[Any],
        stored_bytes: int | None,
        resume_file: Path | None,
        weighed: Iterable[Any] | None = None,
    ) -> None:
        self.detector, self.structure, self.batches, self.weighed = detector, structure, batches, weighed
        self.cfg: ProtectConfig = cfg.protect or ProtectConfig()
        self.budget = Budget(cfg, detector, structure, stored_bytes)
        self.meter = DamageMeter(detector, structure, images, resume_file)
        self.policies = weight_policies(detector, structure, cfg, self.meter.run_one)
        self.sets = tensor_sets(structure)
        self.between = unread(structure)
        self.compensates = cfg.reconstruct is not None and cfg.reconstruct.compensate
        self.cases: dict[TensorSet, _Case] = {}
        self.rest = 0.0  # loss that the tensors which are not among the worst leave

    def run(self) -> Protection:
        before = self.whole()
        print_log(
            f'filtered global loss of the quantized detector on {self.meter.num_images} images: {before.loss:.4g}',
            'current',
        )
        try:
            if self.budget.exceeded(self.cost()):
                self.shrink()
            self.protect()
            after = self.whole()
            if self.cfg.max_loss is not None and after.loss > self.cfg.max_loss:
                raise PTQError(
                    f'the budget `ptq.protect.max_loss` = {self.cfg.max_loss:g} cannot be kept: the least that was '
                    f'reached is {after.loss:.4g}; raise it to that or more, or allow more cost or `max_tensors`.'
                )
        except BaseException:
            for case in self.cases.values():
                self.take(case, case.start)
            raise
        return self.settle(before, after)

    # ------------------------------------------------------------------ the phases

    def shrink(self) -> None:
        """Goes to fewer bits where they cost the least loss for what they save, until the budget is kept."""
        self.offer(self.sets, ['lower'])
        cases = [case for case in self.cases.values() if case.candidates]
        self.budget.refuse(self.cost({case.tensors: case.candidates[0] for case in cases}))
        self.measure_offers(cases, 'measuring fewer bits')
        for case in track(cases, description='measuring present bits'):
            case.start.loss = self.damage([case.tensors], _key([case.tensors])).loss
        while exceeded := self.budget.exceeded(self.cost()):
            now, best = self.cost(), None
            for place, case in enumerate(cases):
                lower = case.candidates[0]
                saved = self.budget.saving(exceeded, now, self.cost({case.tensors: lower}))
                if case.now is case.start and saved > 0:
                    rank = max(lower.loss - case.start.loss, 0.0) / saved, place
                    best = min(best, rank) if best else rank
            # together they keep the budget, as was made sure of above
            case = cases[best[1]]
            self.take(case, case.candidates[0])

    def protect(self) -> None:
        """Better formats for the worst tensors, as long as they help the whole detector."""
        start = self.whole().loss
        shrunk = {case.tensors: case.now for case in self.cases.values()}
        worst = self.find_worst()
        self.offer(worst, self.cfg.candidates)
        cases = [self.cases[tensors] for tensors in worst]
        for case in cases:  # what alone is too much is not worth a measurement
            case.candidates = [c for c in case.candidates if self.budget.allows_float(self.cost({case.tensors: c}))]
        self.measure_offers(cases, 'measuring other formats')
        for stage in _STAGES:
            target = self.cfg.min_share * self.whole().loss
            while not self.is_good_enough() and (move := self.best_move(cases, stage, target)):
                self.take(*move)
        if self.whole().loss > start:
            print_log(
                'the formats chosen for protection do not help together, so none of them is taken',
                'current',
                level=logging.WARNING,
            )
            for case in cases:
                self.take(case, shrunk.get(case.tensors, case.start))

    def find_worst(self) -> list[TensorSet]:
        """The most sensitive tensor sets, by group testing.

        A group is taken to lose at least what its worst member loses, so the sets come out in the order of their
        losses; the search ends at the first one that is small beside what those before it leave of the whole loss.
        """
        # present formats are those of the resume file only as long as nothing was changed
        keep = all(case.now is case.start for case in self.cases.values())
        heap, found = [], []

        def measure(group: list[TensorSet]) -> None:
            loss = self.damage(group, _key(group) if keep else None).loss
            heapq.heappush(heap, (-loss, self.sets.index(group[0]), group))  # equal losses: in the order of layers

        for kind in (ACTIVATION, WEIGHT):
            if group := [s for s in self.sets if s.kind == kind]:
                measure(group)
        self.rest = sum(-loss for loss, _, _ in heap)
        while heap and len(found) < self.cfg.max_tensors:
            step('searching sensitive tensors', len(found), self.cfg.max_tensors)
            loss, _, group = heapq.heappop(heap)
            if -loss <= self.cfg.min_share * self.rest:
                break
            if len(group) > 1:
                measure(group[: len(group) // 2])
                measure(group[len(group) // 2 :])
                continue
            found.append(group[0])
            self.case(group[0]).now.loss = -loss
            self.rest = max(self.rest + loss, 0.0)
        return found

    def best_move(self, cases: Sequence[_Case], stage: str, target: float) -> tuple[_Case, Candidate] | None:
        """The change with the largest gain for its price that the budget allows.

        Args:
            cases: Tensor sets that may change.
            stage: ``'free'`` looks at formats that add no bit operations, ``'integer'`` at the others, ``'float'`` at
                floating point.
            target: Formats that are not free are only for tensor sets that lose more than this.
        """
        now, best = self.cost(), None
        for place, case in enumerate(cases):
            for number, candidate in enumerate([case.start, *case.candidates]):
                gain = case.now.loss - candidate.loss
                if gain <= 0 or gain < LEAST_GAIN * case.now.loss:
                    continue
                cost = self.cost({case.tensors: candidate})
                needs = 'float' if candidate.is_float else 'integer' if (cost - now).bops > 0 else 'free'
                if needs != stage or self.budget.exceeded(cost) or needs != 'free' and case.now.loss <= target:
                    continue
                worth = gain if needs == 'free' else gain / max(self.budget.price(cost - now), 1e-12)
                rank = worth, -place, -number
                if best is None or rank > best[0]:
                    best = rank, case, candidate
        return best and best[1:]

    def settle(self, before: Damage, after: Damage) -> Protection:
        """Writes the choices into the structure."""
        changed = {case.tensors: case for case in self.cases.values() if case.now is not case.start}
        cost, choices = self.cost(), []
        for tensors, case in changed.items():
            added = cost - self.cost({tensors: case.start})
            choices.append(
                Choice(
                    tensors.name,
                    tensors.kind,
                    tensors.layers,
                    case.start.label,
                    case.now.label,
                    case.start.loss,
                    case.now.loss,
                    added.size_bytes,
                    added.bops,
                    added.float_macs,
                )
            )
        choices.sort(key=lambda choice: -choice.loss_before)
        for tensors, case in changed.items():
            adopt(self.detector, self.structure, tensors, case.now)
        for choice in choices:
            print_log(
                f'{choice.tensor}: {choice.was} -> {choice.now}, its loss {choice.loss_before:.3g} -> '
                f'{choice.loss_after:.3g}',
                'current',
            )
        print_log(f'{len(choices)} tensors have other formats; loss {before.loss:.4g} -> {after.loss:.4g}', 'current')
        return Protection(
            overrides_for({t: case.now for t, case in changed.items()}),
            choices,
            before,
            after,
            self.budget.size_bytes(cost),
            cost.bops,
            self.budget.size_limit,
        )

    # ------------------------------------------------------------------ pieces

    def cost(self, others: dict[TensorSet, Candidate] | None = None) -> Cost:
        """Cost of the detector with the present choices, some of them replaced."""
        specs = {}
        for tensors, candidate in {**{t: case.now for t, case in self.cases.items()}, **(others or {})}.items():
            specs.update(candidate.specs(tensors))
        return self.budget.cost(self.structure, specs)

    def damage(self, sets: Sequence[TensorSet], key: str | None = None, between: Sequence[str] = ()) -> Damage:
        """What quantizing these tensor sets does, each in its present format, with others between the layers."""
        kept = [s for s in sets if s not in self.cases or not self.cases[s].now.is_float]
        activations, weights = split_kinds(kept)
        return self.meter.measure([*activations, *between], weights, key=key)

    def whole(self) -> Damage:
        """What the whole quantized detector loses, each tensor in its present format."""
        return self.damage(self.sets, between=self.between)

    def case(self, tensors: TensorSet) -> _Case:
        if tensors not in self.cases:
            start = present(self.detector, self.structure, tensors)
            self.cases[tensors] = _Case(tensors, start, start)
        return self.cases[tensors]

    def take(self, case: _Case, candidate: Candidate) -> None:
        case.now = candidate
        put_in(self.detector, case.tensors, candidate)

    def offer(self, sets: Sequence[TensorSet], kinds: Sequence[str]) -> None:
        for tensors in sets:
            # reconstruction in closed form ranges the weights that it solves by their squared error
            undone = ('range',) if tensors.kind == WEIGHT and self.compensates else ()
            self.case(tensors).candidates = candidates_for(
                self.detector, self.structure, tensors, [kind for kind in kinds if kind not in undone], self.policies
            )

    def measure_offers(self, cases: Sequence[_Case], told: str) -> None:
        """Observes the candidates and measures each by itself."""
        integer = [(case, c) for case in cases for c in case.candidates if not c.is_float]
        observe_candidates(self.detector, self.batches, [candidate for _, candidate in integer], self.weighed)
        for case in cases:
            for candidate in case.candidates:
                candidate.loss = 0.0  # a float one stays at it
        for case, candidate in track(integer, description=told):
            with self.instead(case, candidate):
                key = f'{_key([case.tensors])}: {candidate.kind}, {candidate.label}'
                candidate.loss = self.meter.measure(*split_kinds([case.tensors]), key=key).loss

    @contextmanager
    def instead(self, case: _Case, candidate: Candidate) -> Iterator[None]:
        """Runs a block of code with a candidate in place of the present format."""
        put_in(self.detector, case.tensors, candidate)
        try:
            yield
        finally:
            put_in(self.detector, case.tensors, case.now)

    def is_good_enough(self) -> bool:
        return self.cfg.max_loss is not None and self.whole().loss <= self.cfg.max_loss


def _key(sets: Sequence[TensorSet]) -> str:
    """Names neighbours in the order of layers, for the resume file."""
    names = [name for s in sets for name in s.tensors]
    return f'{sets[0].kind} {names[0]}' + (f' and {len(names) - 1} more to {names[-1]}' if len(names) > 1 else '')
