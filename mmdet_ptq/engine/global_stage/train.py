"""The global stage: the quantized detector behind mmengine's training interface, and how it is trained."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from uuid import uuid4

import torch
from mmengine.device import get_device
from mmengine.dist import barrier, get_world_size, is_distributed, is_main_process
from mmengine.logging import MMLogger, print_log
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmdet_ptq.calibration import FilteredGlobalLoss
from mmdet_ptq.calibration.augment import Augmented
from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.engine.global_stage.divergence import IMAGES, check_divergence, mean_loss
from mmdet_ptq.engine.global_stage.optim import by_iterations, train_only_quantization
from mmdet_ptq.engine.run import Run, unwrapped
from mmdet_ptq.engine.stage_store import latest_checkpoint
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import load_tensors
from mmdet_ptq.predictions import AlignedPredictions, predict_aligned


class GlobalRunner(Runner):
    """The stock mmengine Runner of the global stage: its own loops, optimizer, hooks and checkpoints.

    It logs, draws and is distributed as the run is.

    Args:
        run: The run.
        **kwargs: mmengine Runner's arguments.
    """

    def __init__(self, run: Run, **kwargs) -> None:
        self.run_logger = run.logger
        level = run.logger.level
        run.logger.setLevel(logging.WARNING)  # environment and config were logged
        try:
            super().__init__(
                cfg=run.cfg,
                visualizer=run.visualizer,
                launcher=run.launcher,
                log_processor=run.log_processor,
                env_cfg=run.cfg.get('env_cfg') or dict(dist_cfg=dict(backend='nccl')),
                default_scope=run.default_scope.scope_name,
                experiment_name=f'global_{uuid4().hex}',
                randomness=dict(seed=run.seed, diff_rank_seed=False, deterministic=run.deterministic),
                **kwargs,
            )
        finally:
            run.logger.setLevel(level)

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """The run's logger."""
        return self.run_logger

    def dump_config(self) -> None:
        """Does nothing: the run has written it."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """The model, which averages its gradients over the ranks where there are several."""
        if not is_distributed():
            return super().wrap_model(model_wrapper_cfg, model)
        model = model.to(get_device())
        if get_world_size() == 1:
            return model
        # not as the config says: that is for training, where every parameter is used in every iteration
        ids = None if get_device() == 'cpu' else [torch.cuda.current_device()]
        return MMDistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True)


def train_global(run: Run) -> None:
    """Trains a run's quantized detector, in place, with mmengine's loop, hooks and checkpoints.

    Args:
        run: Its ``ptq`` block has a ``global_loss``, its detector is calibrated.

    Raises:
        PTQError: Training diverged, and no images were held out to choose an earlier state by.
    """
    cfg, folder = run.ptq.global_loss, run.folder / 'global' / run.inputs['global']
    if not run.stages.resume and is_main_process():
        for stale in folder.glob('*.pth'):
            stale.unlink()
    going_on_from = latest_checkpoint(folder) if run.stages.resume else None
    train, held_out = run.split(cfg.holdout)
    train_only_quantization(run.detector, cfg.rates())
    images = Augmented(train, cfg.augment if cfg.target == 'float' else 1, run.seed)
    model = GlobalLossModel(run.detector, FilteredGlobalLoss(cfg, shared=run.world_size > 1))
    # the same images on every rank
    seen = run.calibration.part(range(min(IMAGES, len(train))))
    before = None if len(held_out) else _loss_on(run, model, seen)
    kwargs = dict(
        model=model,
        work_dir=str(folder),
        train_dataloader=run.endless_loader(images, min(cfg.batch_size, len(images))),
        train_cfg=dict(type='mmdet_ptq.GlobalCalibrationLoop', max_iters=cfg.iters, val_interval=cfg.val_interval),
        load_from=going_on_from,
        resume=going_on_from is not None,
        **_optimizer(cfg),
    )
    # two: mmengine removes the oldest before it writes the next, and a run may be killed in between
    checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=cfg.checkpoint_interval, max_keep_ckpts=2)
    if len(held_out):
        checkpoint.update(save_best='global_loss', rule='less')
        kwargs.update(
            val_dataloader=run.whole_loader(held_out, cfg.batch_size),
            val_cfg=dict(type='mmdet_ptq.HeldOutLossLoop'),
            val_evaluator=[],
        )
    hook = dict(type='mmdet_ptq.FilteredGlobalLossHook', detector=run.float_detector)
    runner = GlobalRunner(
        run,
        **kwargs,
        custom_hooks=[hook, dict(type='mmdet_ptq.ProgressHook'), *copy.deepcopy(cfg.hooks)],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=cfg.log_interval), checkpoint=checkpoint),
    )
    runner.train()
    barrier()  # the main process may still be writing
    info = runner.message_hub.runtime_info
    best = info.get('best_ckpt')
    if best is not None:
        print_log(f'the state with the least held-out loss is kept: {Path(best).stem}', 'current')
    # the last from its file, too: hooks such as EMAHook put other weights there than they train
    state = load_tensors(best or info['last_ckpt'])['state_dict']
    unwrapped(runner.model).load_state_dict(state)
    run.detector.eval()
    if before is not None:
        check_divergence(before, _loss_on(run, model, seen))


def _loss_on(run: Run, model: GlobalLossModel, images: Dataset) -> float:
    """The mean loss on some images, over the same boxes in every state."""

    def batch_loss(batch: dict) -> float:
        model.set_target(run.float_detector, batch)
        return model.held_out_loss(batch)['loss']

    return mean_loss(batch_loss, run.whole_loader(images))


def _optimizer(cfg: GlobalLossConfig) -> dict:
    """Configs of mmengine's optimizer wrapper and schedulers."""
    optimizer = dict(
        **copy.deepcopy(cfg.optim_wrapper),
        constructor='mmdet_ptq.QuantizationParamsConstructor',
        paramwise_cfg=cfg.rates(),
    )
    schedulers = cfg.param_scheduler or [
        dict(type='CosineAnnealingLR', begin=0, end=cfg.iters, T_max=cfg.iters, eta_min_ratio=1e-2)
    ]
    return dict(optim_wrapper=optimizer, param_scheduler=[by_iterations(scheduler) for scheduler in schedulers])


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
        target: The float detector's predictions on the current batch, see :meth:`set_target`.
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
            inputs: (N, C, H, W) preprocessed images.
            data_samples: Meta information of the N images; for ``target='ground_truth'`` with ``gt_instances``
                in pixels of the network input, as pipelines leave them that load annotations before resizing.
            mode: ``'loss'``.
        """
        if mode != 'loss':
            raise ValueError(f"GlobalLossModel only has mode 'loss', got {mode!r}")
        student = predict_aligned(self.detector, inputs, data_samples, reference=self.target)
        return self.loss(student, self.target, self._annotations(data_samples))

    def _annotations(self, data_samples: list) -> list | None:
        if self.loss.cfg.target != 'ground_truth':
            return None
        if not all('gt_instances' in sample and 'bboxes' in sample.gt_instances for sample in data_samples):
            raise PTQError(
                "`ptq.global_loss.target='ground_truth'` needs annotated calibration images; use "
                "target='float' for images without annotations."
            )
        return [sample.gt_instances for sample in data_samples]

    @torch.no_grad()
    def set_target(self, detector: nn.Module, data: dict) -> None:
        """Takes the float detector's predictions on a batch as the target."""
        data = self.data_preprocessor(data, False)
        self.target = predict_aligned(detector, data['inputs'], data['data_samples']).detach()

    @torch.no_grad()
    def held_out_loss(self, data: dict) -> dict[str, float]:
        """The loss terms of one batch, and their sum as ``loss``, over the same boxes in every state."""
        data = self.data_preprocessor(data, False)
        student = predict_aligned(self.detector, data['inputs'], data['data_samples'], reference=self.target)
        _, terms = self.parse_losses(self.held_out(student, self.target, self._annotations(data['data_samples'])))
        return {key: float(value) for key, value in terms.items()}
