"""What a person is told while a run goes on: its stages, and how far each of them is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_ptq.engine.stage_store import StageRecord, StageStore
from mmdet_ptq.progress import stage, step, taken_over
from mmdet_ptq.registry import HOOKS


class ToldStages(StageStore):
    """The stages of a work directory, told as they come.

    Attributes:
        expected: Stage to the seconds that it is thought to take.
    """

    expected: Mapping[str, float] = MappingProxyType({})

    def finished(self, name: str, inputs: str) -> StageRecord | None:
        record = super().finished(name, inputs)
        if record is not None:
            taken_over(self.part + name)
        return record

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        told = self.part + name
        with stage(told, self.expected.get(told)), super().timed(name):
            yield


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows how far mmengine's loops are."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        step('training', runner.iter + 1, runner.max_iters)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: Sequence | None = None
    ) -> None:
        step('batches', batch_idx + 1, len(runner.test_loop.dataloader))
