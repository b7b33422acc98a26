"""Evaluating a detector with the config's own test dataloader and evaluator."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from ..deploy import integer_arithmetic
from ..errors import PTQError
from ..files import check_space
from ..wrapping import is_quantized

# settings of a dataloader that change no image
LOADING = ('num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'timeout')


def evaluate(cfg: Config, detector: nn.Module) -> dict[str, float]:
    """Runs mmdet's test loop; a quantized detector computes as integer kernels do.

    Args:
        cfg: The config whose ``test_dataloader`` and ``test_evaluator`` are used; ``work_dir`` must be set.
        detector: The detector, float or quantized.

    Returns:
        Every figure of the evaluator.

    Raises:
        PTQError: The config has no evaluation, or one of its files is missing.
    """
    for key in ('test_dataloader', 'test_evaluator'):
        if cfg.get(key) is None:
            raise PTQError(f'the config has no `{key}`, which detectors are evaluated with.')
    check_space(cfg['work_dir'], 0)
    runner = Runner(
        model=detector, work_dir=cfg['work_dir'], test_dataloader=cfg['test_dataloader'],
        test_evaluator=cfg['test_evaluator'], test_cfg=cfg.get('test_cfg') or dict(type='TestLoop'),
        default_hooks=evaluation_hooks(cfg.get('default_hooks')), launcher=cfg.get('launcher', 'none'),
        env_cfg=cfg.get('env_cfg', dict(dist_cfg=dict(backend='nccl'))),
        log_processor=dict(type='LogProcessor', window_size=10, by_epoch=False),
        log_level=cfg.get('log_level', 'INFO'), visualizer=cfg.get('visualizer'),
        default_scope=cfg.get('default_scope', 'mmdet'), cfg=cfg)
    with evaluation_files():
        loop = runner.test_loop
    runner.logger.info(f'{len(loop.dataloader.dataset)} evaluation images')
    with integer_arithmetic(detector) if is_quantized(detector) else nullcontext():
        return {key: float(value) for key, value in runner.test().items()}


def evaluation_inputs(cfg: Config) -> str:
    """What an evaluation's figures depend on: the test dataloader, however its images are loaded, and the evaluator."""
    loader = {key: value for key, value in (cfg.get('test_dataloader') or {}).items() if key not in LOADING}
    return f'{loader} {cfg.get("test_evaluator")}'


@contextmanager
def evaluation_files() -> Iterator[None]:
    """Turns a missing file of the evaluation's data or metrics into one sentence.

    Raises:
        PTQError: The file is missing.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PTQError(f'the evaluation needs the file {str(error.filename or error)!r}, which does not exist; '
                       'check `test_dataloader.dataset` and `test_evaluator.ann_file`.') from error


def evaluation_hooks(hooks: dict | None) -> dict:
    """The user's default hooks without those that only training needs."""
    training = ('checkpoint', 'param_scheduler')
    return {**{name: hook for name, hook in (hooks or {}).items() if name not in training},
            **dict.fromkeys(training)}
