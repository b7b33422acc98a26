"""Hooks of the global stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmdet_ptq.engine.run import unwrapped
from mmdet_ptq.registry import HOOKS


@HOOKS.register_module()
class FilteredGlobalLossHook(Hook):
    """Supplies the float detector's predictions to the filtered global loss, each iteration.

    The loss (Reg-PTQ, CVPR 2024) compares the quantized detector with these predictions on the boxes that pass the
    confidence and the IoU filter. The number of kept boxes is logged with the loss terms. Before the first iteration
    the held-out loss is measured, so that the best state can be the initial one; a resumed run measures again what
    may have been cut off after the checkpoint it goes on from.

    Args:
        detector: The float detector.
    """

    # after CheckpointHook, whose before_train must have run before the first held-out loss
    priority = 'LOWEST'

    def __init__(self, detector: nn.Module) -> None:
        detector.eval()
        self.detector = detector

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Lets files that the checkpoint names be those of this work directory, which may have been moved."""
        info = checkpoint.get('message_hub', {}).get('runtime_info', {})
        for key in ('best_ckpt', 'last_ckpt'):
            if info.get(key):
                info[key] = str(Path(runner.work_dir) / Path(info[key]).name)

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        if runner.val_loop is not None and (loop.iter % loop.val_interval == 0 or loop.iter == loop.max_iters):
            runner.val_loop.run()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        unwrapped(runner.model).set_target(self.detector, data_batch)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict | Sequence | None = None) -> None:
        unwrapped(runner.model).set_target(self.detector, data_batch)
