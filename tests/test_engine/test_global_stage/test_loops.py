"""The loops of the global stage in mmengine's own runner, on a model of one number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdet_ptq.engine.global_stage.hooks import FilteredGlobalLossHook
from mmdet_ptq.engine.global_stage.loops import GlobalCalibrationLoop, HeldOutLossLoop

NUMBERS = itertools.count()
HELD_OUT = [1.0, 2.0, 6.0]


class Model(BaseModel):
    """Is pulled towards what it sees; its held-out loss is a parabola, or what is given."""

    def __init__(self, losses: Iterator[float] | None = None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(5.0))
        self.losses, self.modes, self.seen, self.targets = losses, [], [], []

    def set_target(self, detector: nn.Module, data: Tensor) -> None:
        self.targets.append(data)

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'loss') -> dict[str, Tensor]:
        return dict(loss_a=(self.value - inputs.mean()).square())

    def train_step(self, data: Tensor, optim_wrapper) -> dict[str, Tensor]:
        self.seen.append(data)
        loss = self(data)['loss_a']
        optim_wrapper.update_params(loss)
        return dict(loss=loss.detach())

    def held_out_loss(self, data: Tensor) -> dict[str, float]:
        assert self.targets[-1] is data  # the hook has given the target of this batch
        self.modes.append(self.training)
        if self.losses is not None:
            return dict(loss_a=1.0, kept=4.0, loss=next(self.losses))
        loss = float((self.value - data).square().mean())
        return dict(loss_a=loss / 2, kept=float(data.mean()), loss=loss)


class Spy(Hook):
    """Keeps the order of the calls, and the figures of each look."""

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.calls, self.metrics = [], []

    def before_val(self, runner) -> None:
        self.calls.append('before_val')

    def before_val_epoch(self, runner) -> None:
        self.calls.append('before_val_epoch')

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.calls.append(('iter', batch_idx, float(data_batch)))

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.calls.append('after_val_epoch')
        self.metrics.append(dict(metrics))

    def after_val(self, runner) -> None:
        self.calls.append('after_val')


@pytest.fixture
def make(tmp_path):
    def build(model: Model, iters: int = 4, interval: int = 2, held_out=tuple(HELD_OUT)) -> tuple[Runner, Spy]:
        spy = Spy()
        runner = Runner(
            model=model,
            work_dir=str(tmp_path),
            train_dataloader=DataLoader([0.0] * (iters + 1), batch_size=1),
            train_cfg=dict(type='mmdet_ptq.GlobalCalibrationLoop', max_iters=iters, val_interval=interval),
            val_dataloader=DataLoader(list(held_out), batch_size=1),
            val_cfg=dict(type='mmdet_ptq.HeldOutLossLoop'),
            val_evaluator=[],
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.25)),
            custom_hooks=[FilteredGlobalLossHook(nn.Identity()), spy],
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=100),
                checkpoint=dict(
                    type='CheckpointHook', by_epoch=False, interval=100, save_best='global_loss', rule='less'
                ),
            ),
            experiment_name=f'loops_{next(NUMBERS)}',
            log_level='ERROR',
        )
        return runner, spy

    return build


def test_training_runs_so_many_iterations_and_looks_at_every_so_many(make):
    model = Model()
    runner, spy = make(model)
    runner.train()
    assert isinstance(runner.train_loop, GlobalCalibrationLoop) and isinstance(runner.val_loop, HeldOutLossLoop)
    assert runner.iter == len(model.seen) == 4 and len(spy.metrics) == 3
    # halved with each iteration
    assert float(model.value) == pytest.approx(5 / 2**4)
    values = [5.0, 5 / 4, 5 / 16]
    expected = [sum((value - x) ** 2 for x in HELD_OUT) / len(HELD_OUT) for value in values]
    assert [metrics['global_loss'] for metrics in spy.metrics] == pytest.approx(expected)
    assert [metrics['loss_a'] for metrics in spy.metrics] == pytest.approx([loss / 2 for loss in expected])
    assert all(metrics['kept'] == 3 and metrics.keys() == {'global_loss', 'loss_a', 'kept'} for metrics in spy.metrics)


def test_hooks_are_called_as_mmengines_loop_does(make):
    model = Model()
    runner, spy = make(model, iters=1, interval=5)
    runner.train()
    look = [
        'before_val',
        'before_val_epoch',
        *(('iter', index, value) for index, value in enumerate(HELD_OUT)),
        'after_val_epoch',
        'after_val',
    ]
    # before the first iteration and after the last
    assert spy.calls == 2 * look and model.modes == [False] * 6


def test_the_state_of_the_least_loss_is_kept_and_none_that_is_no_number(make, tmp_path, capsys):
    model = Model(iter([3.0, math.nan, 2.0, math.inf, -math.inf]))
    runner, spy = make(model, iters=4, interval=1, held_out=[1.0])
    runner.train()
    assert [metrics['global_loss'] for metrics in spy.metrics] == [3, math.inf, 2, math.inf, math.inf]
    (best,) = tmp_path.glob('best_*.pth')
    assert best.stem == 'best_global_loss_iter_2'
    assert torch.load(best, weights_only=False)['state_dict']['value'] == pytest.approx(5 / 4)


def test_a_loss_that_is_no_number_is_told(make, monkeypatch):
    said = []
    monkeypatch.setattr(
        'mmdet_ptq.engine.global_stage.loops.print_log', lambda text, *args, **kwargs: said.append(text)
    )
    runner, _ = make(Model(iter([1.0, math.nan])), iters=2, interval=2, held_out=[1.0])
    runner.train()
    assert len(said) == 1 and said[0].startswith('the held-out loss after 2 iterations is not finite')
    assert '`ptq.global_loss`' in said[0]


def test_one_batch_that_is_no_number_ruins_the_mean(make):
    runner, spy = make(Model(iter([1.0, math.nan, 1.0, 1.0, 1.0, 4.0])), iters=1, interval=5)
    runner.train()
    assert [metrics['global_loss'] for metrics in spy.metrics] == [math.inf, 2]
    assert [metrics['loss_a'] for metrics in spy.metrics] == [1, 1]


def test_what_is_logged_is_of_this_state_alone(make):
    runner, spy = make(Model(iter([9.0, 1.0])), iters=2, interval=2, held_out=[1.0])
    runner.train()
    logged = runner.message_hub.log_scalars['val/global_loss']
    assert logged.current() == 1 and logged.mean(10) == 1


def test_the_usual_interval():
    loop = GlobalCalibrationLoop(None, DataLoader([0.0]), max_iters=7)
    assert (loop.max_iters, loop.val_interval, loop.iter) == (7, 50, 0)
