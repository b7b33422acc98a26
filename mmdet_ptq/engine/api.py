"""Quantizing and loading from Python, without the command line."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.calibration import LoadedSamples
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import build_detector, get_runtime, load_quantized_state, read_quantized
from mmdet_ptq.engine.runner import PTQRunner
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.watching.tensors import deep_copy


def quantize(
    model: nn.Module,
    calibration_loader: Iterable[Any],
    preset: str = 'w8a8',
    *,
    ptq: dict | None = None,
    work_dir: str | None = None,
) -> nn.Module:
    """Quantizes a trained mmdet detector.

    Args:
        model: The float detector, e.g. from ``mmdet.apis.init_detector``; it is not changed.
        calibration_loader: Yields mmdet batches ``dict(inputs=[...], data_samples=[...])``.
        preset: Name of a preset. Defaults to ``'w8a8'``.
        ptq: Further keys of the ``ptq`` block. With ``export``, models for these runtimes are written, too, but not
            evaluated. Defaults to None.
        work_dir: Keeps the integer checkpoint ``quantized.pth``, exported models and the logs. Defaults to None, which
            keeps nothing.

    Returns:
        The quantized detector, rebuilt from its integer codes.

    Raises:
        PTQError: The preset or block is wrong, the loader yields nothing, or models are to be exported nowhere.
    """
    block = PTQConfig.from_dict(ptq or {}, preset=preset)
    if block.export and work_dir is None:
        raise PTQError('`ptq.export` writes models into `work_dir`; give `quantize` one.')
    samples = LoadedSamples(calibration_loader)
    with tempfile.TemporaryDirectory() as temporary:
        runner = PTQRunner(
            model=deep_copy(model),
            work_dir=work_dir or temporary,
            ptq=block,
            calibration=samples,
            default_scope='mmdet',
            cfg=getattr(model, 'cfg', None),
            log_processor=dict(type='LogProcessor', window_size=10, by_epoch=False),
        )
        detector = runner.calibrate()
        for name in block.export:
            path = get_runtime(name).export(
                copy.deepcopy(detector).cpu(), Path(runner.work_dir) / name, runner.input_shape
            )
            print_log(f'{name}: {path}', 'current')
    for name in ('cfg', 'dataset_meta'):
        if hasattr(model, name):
            setattr(detector, name, getattr(model, name))
    return detector


def load_quantized(path: str | os.PathLike, config: Config | str | None = None, device: str = 'cpu') -> nn.Module:
    """Loads a quantized detector, ready for ``mmdet.apis.inference_detector``.

    Args:
        path: A ``quantized.pth``.
        config: Replaces the config stored in the checkpoint.
        device: Where the detector goes. Defaults to ``'cpu'``.

    Returns:
        The detector in eval mode, its weights exactly the values of the integer codes.

    Raises:
        PTQError: The file is no quantized checkpoint, or does not fit the config.
    """
    state = read_quantized(path)
    if config is None:
        config = Config(state['config'])
    elif not isinstance(config, Config):
        config = Config.fromfile(str(config))
    if config.get('model') is None:
        raise PTQError(f'{str(path)!r} carries no model config; give `config`.')
    detector = build_detector(config)
    load_quantized_state(detector, state)
    detector.cfg = config
    detector.dataset_meta = state['dataset_meta']
    return detector.to(device).eval()
