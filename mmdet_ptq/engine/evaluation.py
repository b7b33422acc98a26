"""Evaluating a detector with the config's own test dataloader and evaluator."""
from __future__ import annotations

from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from .runner import evaluation_hooks


def evaluate(cfg: Config, detector: nn.Module) -> dict[str, float]:
    """Runs mmdet's test loop.

    Args:
        cfg: The config whose ``test_dataloader`` and ``test_evaluator`` are used; ``work_dir`` must be set.
        detector: The detector, float or quantized.

    Returns:
        Every figure of the evaluator.
    """
    runner = Runner(
        model=detector, work_dir=cfg['work_dir'], test_dataloader=cfg['test_dataloader'],
        test_evaluator=cfg['test_evaluator'], test_cfg=cfg.get('test_cfg') or dict(type='TestLoop'),
        default_hooks=evaluation_hooks(cfg.get('default_hooks')), launcher=cfg.get('launcher', 'none'),
        env_cfg=cfg.get('env_cfg', dict(dist_cfg=dict(backend='nccl'))),
        log_processor=dict(type='LogProcessor', window_size=10, by_epoch=False),
        log_level=cfg.get('log_level', 'INFO'), visualizer=cfg.get('visualizer'),
        default_scope=cfg.get('default_scope', 'mmdet'), cfg=cfg)
    return {key: float(value) for key, value in runner.test().items()}
