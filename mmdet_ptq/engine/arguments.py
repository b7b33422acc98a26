"""From an mmdet config with a ``ptq`` block to the arguments of the runner."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from uuid import uuid4

from mmengine.config import Config
from mmengine.logging import print_log

from mmdet_ptq.compat import replace_sync_bn
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.engine.evaluation import evaluation_arguments
from mmdet_ptq.errors import PTQError


def runner_arguments(cfg: Config) -> dict[str, Any]:
    """What :class:`mmdet_ptq.engine.PTQRunner` is built with; what only training needs is left out.

    Args:
        cfg: The config. ``load_from`` names the float checkpoint, ``resume`` takes finished stages over.

    Raises:
        PTQError: The block is wrong, or no checkpoint or no evaluation is named.
    """
    ptq = PTQConfig.from_dict(cfg.get('ptq'))
    if not cfg.get('load_from'):
        raise PTQError('no float checkpoint is named; give CHECKPOINT on the command line or set `load_from`.')
    cfg = copy.deepcopy(cfg)
    for key in ('model', 'test_dataloader', 'train_dataloader', 'default_hooks', 'env_cfg', 'randomness'):
        if not isinstance(cfg.get(key), dict | None):
            raise PTQError(f'`{key}` must be a dict, got {cfg[key]!r:.100}.')
    if not isinstance(cfg.get('custom_hooks'), list | tuple | None):
        raise PTQError(f'`custom_hooks` must be a list of hooks, got {cfg["custom_hooks"]!r:.100}.')
    replace_sync_bn(cfg['model'])
    dropped = [
        hook['type'] if isinstance(hook, dict) else type(hook).__name__ for hook in cfg.get('custom_hooks') or []
    ]
    if dropped:
        print_log(f'custom_hooks belong to training and are not used: {", ".join(map(str, dropped))}', 'current')
    for key in ('test_dataloader', 'test_evaluator'):
        if not cfg.get(key):  # an empty list of metrics gives no figures
            raise PTQError(f'the config has no `{key}`, which the report is made with.')
    return dict(
        evaluation_arguments(cfg),
        model=cfg['model'],
        ptq=ptq,
        data_preprocessor=cfg.get('data_preprocessor'),
        load_from=cfg['load_from'],
        resume=cfg.get('resume', False),
        randomness=cfg.get('randomness'),
        # mmengine's own name has the second: the logs of two runs of one second would go to the first one's file
        experiment_name=cfg.get('experiment_name')
        or f'{Path(getattr(cfg, "filename", None) or "ptq").stem}_{uuid4().hex[:8]}',
    )
