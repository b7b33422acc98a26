"""Loops of the global stage."""

from __future__ import annotations

import logging
import math
from collections import defaultdict

from mmengine.logging import print_log
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from mmdet_ptq.engine.run import unwrapped
from mmdet_ptq.registry import LOOPS


@LOOPS.register_module()
class GlobalCalibrationLoop(IterBasedTrainLoop):
    """mmengine's iteration loop over the calibration images.

    Args:
        runner: The runner.
        dataloader: Calibration images, infinitely.
        max_iters: Iterations.
        val_interval: Iterations between two looks at the held-out images. Defaults to 50.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, max_iters: int, val_interval: int = 50) -> None:
        super().__init__(runner, dataloader, max_iters, val_interval=val_interval)


@LOOPS.register_module()
class HeldOutLossLoop(BaseLoop):
    """Mean global loss on calibration images that are not trained on, over the same boxes in every state.

    Without the IoU filter, which a state could pass by ruining boxes; a loss that is not finite counts as infinite.
    Its ``global_loss`` is what ``CheckpointHook(save_best='global_loss')`` chooses the final state by; evaluation
    images are never looked at.

    Args:
        runner: The runner.
        dataloader: The held-out calibration images.
        evaluator: Unused; mmengine's runner passes it to every validation loop.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, evaluator: object = None) -> None:
        super().__init__(runner, dataloader)

    def run(self) -> dict[str, float]:
        """Returns the mean of every loss term, ``global_loss`` being the sum."""
        self.runner.call_hook('before_val')
        self.runner.call_hook('before_val_epoch')
        model = unwrapped(self.runner.model)
        model.eval()
        sums, batches = defaultdict(float), 0
        for index, batch in enumerate(self.dataloader):
            self.runner.call_hook('before_val_iter', batch_idx=index, data_batch=batch)
            for key, value in model.held_out_loss(batch).items():
                sums[key] += value
            batches += 1
            self.runner.call_hook('after_val_iter', batch_idx=index, data_batch=batch, outputs=None)
        # every rank sees all of them: what is chosen does not depend on how many there are
        metrics = {('global_loss' if key == 'loss' else key): value / batches for key, value in sums.items()}
        if not math.isfinite(metrics['global_loss']):
            metrics['global_loss'] = math.inf
            print_log(
                f'the held-out loss after {self.runner.iter} iterations is not finite; that state is not kept, '
                'and lower rates in `ptq.global_loss` may help',
                'current',
                level=logging.WARNING,
            )
        for key in metrics:
            # mmengine's log shows losses as a mean over its last entries; these are of this state alone
            self.runner.message_hub.log_scalars.pop(f'val/{key}', None)
        self.runner.call_hook('after_val_epoch', metrics=metrics)
        self.runner.call_hook('after_val')
        return metrics
