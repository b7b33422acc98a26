"""The global stage: the quantized detector behind mmengine's training interface, and how it is trained."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..calibration import FilteredGlobalLoss
from ..calibration.augment import Augmented
from ..config import GlobalLossConfig
from ..errors import PTQError
from ..predictions import AlignedPredictions, predict_aligned
from .optim import by_iterations, train_only_quantization
from .stages import latest_checkpoint

if TYPE_CHECKING:
    from .runner import PTQRunner


def train_global(runner: PTQRunner) -> None:
    """Trains the runner's quantized detector, in place, with mmengine's loop, hooks and checkpoints.

    Args:
        runner: Its ``ptq`` block has a ``global_loss``, its detector is calibrated.
    """
    cfg = runner.ptq.global_loss
    train, held_out = runner.split(cfg.holdout)
    train_only_quantization(runner.detector, cfg.rates())
    model = GlobalLossModel(runner.detector, FilteredGlobalLoss(**cfg.loss_kwargs()))
    runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)
    images = Augmented(train, cfg.augment if cfg.target == 'float' else 1, runner.seed)
    runner._train_dataloader = runner.images_loader(images, min(cfg.batch_size, len(images)), infinite=True)
    runner._train_loop = dict(
        type='mmdet_ptq.GlobalCalibrationLoop', max_iters=cfg.iters, val_interval=cfg.val_interval)
    if len(held_out):
        runner._val_dataloader = runner.images_loader(held_out, cfg.batch_size)
        runner._val_loop = dict(type='mmdet_ptq.HeldOutLossLoop')
    runner.optim_wrapper, runner.param_schedulers = _optimizer(cfg)
    folder = Path(runner.work_dir) / 'global' / runner.inputs['global']
    with _hooks(runner, len(held_out) > 0), _inside(runner, folder):
        if not runner.stages.resume and is_main_process():
            for stale in folder.glob('*.pth'):
                stale.unlink()
        runner._load_from = latest_checkpoint(folder) if runner.stages.resume else None
        runner._resume, runner._has_loaded = runner._load_from is not None, False
        for key in ('best_score', 'best_ckpt', 'keep_ckpt_ids', 'last_ckpt'):
            runner.message_hub.runtime_info.pop(key, None)
        runner.train()
        barrier()  # the main process may still be writing
        info = runner.message_hub.runtime_info
        best = info.get('best_ckpt')
        if best is not None:
            print_log(f'the state with the least held-out loss is kept: {Path(best).stem}', 'current')
        # the last from its file, too: hooks such as EMAHook put other weights there than they train. They undo that in
        # a file that training goes on from
        runner._resume = False
        runner.load_checkpoint(best or info['last_ckpt'], strict=True)
    runner._has_loaded = True
    runner.detector.eval()


def _optimizer(cfg: GlobalLossConfig) -> tuple[dict, list[dict]]:
    """Configs of mmengine's optimizer wrapper and schedulers."""
    optimizer = dict(
        **copy.deepcopy(cfg.optim_wrapper), constructor='mmdet_ptq.QuantizationParamsConstructor',
        paramwise_cfg=cfg.rates())
    schedulers = cfg.param_scheduler or [dict(
        type='CosineAnnealingLR', begin=0, end=cfg.iters, T_max=cfg.iters, eta_min_ratio=1e-2)]
    return optimizer, [by_iterations(scheduler) for scheduler in schedulers]


@contextmanager
def _hooks(runner: PTQRunner, held_out: bool) -> Iterator[None]:
    """Hooks of the global stage in place of those of the evaluation."""
    cfg = runner.ptq.global_loss
    before, runner._hooks = runner._hooks, []
    # two: mmengine removes the oldest before it writes the next, and a run may be killed in between
    checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=cfg.checkpoint_interval, max_keep_ckpts=2)
    if held_out:
        checkpoint.update(save_best='global_loss', rule='less')
    hook = dict(type='mmdet_ptq.FilteredGlobalLossHook', detector=runner.float_detector)
    runner.register_hooks(
        dict(logger=dict(type='LoggerHook', interval=cfg.log_interval), checkpoint=checkpoint),
        [hook, *copy.deepcopy(cfg.hooks)])
    try:
        yield
    finally:
        runner._hooks = before


@contextmanager
def _inside(runner: PTQRunner, folder: Path) -> Iterator[None]:
    """Makes a folder the work directory for a while: mmengine finds and leaves its checkpoints there."""
    before, runner._work_dir = runner._work_dir, str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        runner._work_dir = before


class _TestPreprocessor(nn.Module):
    """The detector's data preprocessor without its training augmentations (random sizes, batch mixing)."""

    def __init__(self, preprocessor: nn.Module) -> None:
        super().__init__()
        self.preprocessor = preprocessor

    def forward(self, data: dict, training: bool = False) -> dict:
        return self.preprocessor(data, False)


class GlobalLossModel(BaseModel):
    """Loss of the quantized detector against the float one, for mmengine's loops.

    Args:
        detector: The quantized detector; it stays in eval mode.
        loss: The filtered global loss.

    Attributes:
        target: The float detector's predictions on the current batch, set by ``FilteredGlobalLossHook``.
    """

    def __init__(self, detector: nn.Module, loss: FilteredGlobalLoss) -> None:
        super().__init__(data_preprocessor=_TestPreprocessor(detector.data_preprocessor))
        self.detector = detector
        self.loss = loss
        self.held_out = loss.unfiltered()
        self.target: AlignedPredictions | None = None

    def train(self, mode: bool = True) -> GlobalLossModel:
        super().train(mode)
        self.detector.eval()
        return self

    def init_weights(self) -> None:
        """Does nothing: mmengine calls it before training, and the weights are the trained ones."""

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'loss') -> dict[str, Tensor]:
        """Returns the loss terms; there is no other mode.

        Args:
            inputs: (N, 3, H, W) preprocessed images.
            data_samples: Meta information of the N images; for ``target='ground_truth'`` with ``gt_instances``
                in pixels of the network input, as pipelines leave them that load annotations before resizing.
            mode: ``'loss'``.
        """
        if mode != 'loss':
            raise ValueError(f"GlobalLossModel only has mode 'loss', got {mode!r}")
        student = predict_aligned(self.detector, inputs, data_samples, reference=self.target)
        return self.loss(student, self.target, self._annotations(data_samples))

    def _annotations(self, data_samples: list) -> list | None:
        if self.loss.target != 'ground_truth':
            return None
        if not all('gt_instances' in sample and 'bboxes' in sample.gt_instances for sample in data_samples):
            raise PTQError("`ptq.global_loss.target='ground_truth'` needs annotated calibration images; use "
                           "target='float' for images without annotations.")
        return [sample.gt_instances for sample in data_samples]

    @torch.no_grad()
    def held_out_loss(self, data: dict) -> dict[str, float]:
        """The loss terms of one batch, and their sum as ``loss``, over the same boxes in every state."""
        data = self.data_preprocessor(data, False)
        student = predict_aligned(self.detector, data['inputs'], data['data_samples'], reference=self.target)
        _, terms = self.parse_losses(self.held_out(
            student.with_finite_boxes(), self.target, self._annotations(data['data_samples'])))
        return {key: float(value) for key, value in terms.items()}
