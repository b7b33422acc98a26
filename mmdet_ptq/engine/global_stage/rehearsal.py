"""What mmengine builds for the global stage, built once before any long work: a wrong name costs seconds, not hours."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable

import torch
from mmengine.logging import print_log
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS, Registry
from torch import nn

from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.engine.global_stage.optim import build_wrapper, by_iterations
from mmdet_ptq.engine.run import num_held_out
from mmdet_ptq.errors import PTQError, did_you_mean, first_line

KEY = 'ptq.global_loss'


def rehearse_global(cfg: GlobalLossConfig, images: int) -> None:
    """Builds loss, optimizer, schedulers and hooks of the global stage, and throws them away.

    Args:
        cfg: The ``global_loss`` section.
        images: Number of calibration images.

    Raises:
        PTQError: One of them cannot be built, or no image is left to train on.
    """
    check_holdout(KEY, cfg.holdout, images)
    wrapper = copy.deepcopy(cfg.optim_wrapper)
    for name in ('constructor', 'paramwise_cfg'):
        if name in wrapper:
            raise PTQError(
                f'`{KEY}.optim_wrapper.{name}` must be left out: the rates of the parameters are '
                f'`{KEY}.lr`, `bias_lr`, `weight_lr` and `grid_lr`.'
            )
    _known(f'{KEY}.optim_wrapper', OPTIM_WRAPPERS, wrapper)
    if not isinstance(wrapper.get('optimizer', {}), dict):
        raise PTQError(
            f"`{KEY}.optim_wrapper.optimizer` must be a dict, as dict(type='Adam'), got {wrapper['optimizer']!r}."
        )
    _known(f'{KEY}.optim_wrapper.optimizer', OPTIMIZERS, wrapper.get('optimizer', {}))
    groups = [dict(params=[nn.Parameter(torch.zeros(1))], lr=cfg.lr)]
    optimizer = _built(f'{KEY}.optim_wrapper', lambda: build_wrapper(wrapper, groups))
    for index, scheduler in enumerate(cfg.param_scheduler or ()):
        key = f'{KEY}.param_scheduler[{index}]'
        scheduler = _type(key, PARAM_SCHEDULERS, scheduler, ())
        if scheduler.get('by_epoch') and not scheduler.get('convert_to_iter_based'):
            raise PTQError(
                f'`{key}.by_epoch` must be False, or `convert_to_iter_based` True: the global stage counts '
                'iterations, not epochs.'
            )
        scheduler = by_iterations(scheduler)
        scheduler.pop('convert_to_iter_based', None)
        _built(key, lambda s=scheduler: PARAM_SCHEDULERS.build(s, default_args=dict(optimizer=optimizer)))
    for index, hook in enumerate(cfg.hooks):
        key = f'{KEY}.hooks[{index}]'
        hook = _type(key, HOOKS, hook, ('priority',))
        _built(key, lambda h=hook: HOOKS.build(h))


def check_holdout(key: str, share: float, images: int) -> None:
    """Refuses a share that leaves no image to train on; warns of one that holds none out.

    Args:
        key: The section of the ``ptq`` block, for the message.
        share: Its ``holdout``.
        images: Number of calibration images.
    """
    held_out = num_held_out(share, images)
    if held_out == images:
        raise PTQError(f'`{key}.holdout` leaves none of the {images} calibration images to train on; lower it.')
    if share and not held_out:
        print_log(
            f'`{key}.holdout` holds out none of {images} calibration images, so nothing tells whether training '
            f'helps other images; {math.floor(0.5 / share) + 1} are needed (`ptq.calibration.num_images`)',
            'current',
            level=logging.WARNING,
        )


def _type(key: str, registry: Registry, cfg: dict, leave: tuple[str, ...]) -> dict:
    """A copy without what mmengine's runner takes out of it before it builds."""
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise PTQError(f'`{key}` must be a dict with a `type`, got {cfg!r}.')
    _known(key, registry, cfg)
    return {name: copy.deepcopy(value) for name, value in cfg.items() if name not in leave}


def _known(key: str, registry: Registry, cfg: dict) -> None:
    name = cfg.get('type')
    # as mmengine builds: in the scope of the config first
    with registry.switch_scope_and_registry(None) as scoped:
        if isinstance(name, str) and scoped.get(name) is None:
            raise PTQError(
                f'`{key}.type` is {name!r}, which is not in the registry.'
                f'{did_you_mean(name, {**registry.module_dict, **scoped.module_dict})}'
            )


def _built(key: str, build: Callable):
    try:
        return build()
    except Exception as error:  # whatever a class of the user's raises
        raise PTQError(f'`{key}` cannot be built: {first_line(error)}') from error
