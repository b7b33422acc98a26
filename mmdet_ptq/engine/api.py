"""Quantizing and loading from Python, without the command line."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.calibration import LoadedSamples
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import (
    build_detector,
    get_runtime,
    load_quantized_state,
    open_model,
    read_quantized,
    runtime_detector,
)
from mmdet_ptq.deploy.checkpoint.check import declared_numbers
from mmdet_ptq.deploy.network.canvas import pad_to
from mmdet_ptq.deploy.network.guard import only_registered
from mmdet_ptq.deploy.network.stored_config import stored_config
from mmdet_ptq.engine.detecting import export_detecting
from mmdet_ptq.engine.runner import PTQRunner
from mmdet_ptq.engine.stages.export import announce_coverage
from mmdet_ptq.engine.work_dir import leave_work_dir
from mmdet_ptq.errors import PTQError
from mmdet_ptq.limits import MIB, bounded
from mmdet_ptq.wrapping.watching.tensors import deep_copy

# what loading may take: bytes and seconds of any detector, and more by its numbers
LOADING, LOADING_PER_NUMBER = 768 * MIB, 24
LOADING_SECONDS, NUMBERS_PER_SECOND = 6, 10**6


def quantize(
    model: nn.Module,
    calibration_loader: Iterable[Any],
    preset: str = 'w8a8',
    *,
    ptq: dict | None = None,
    work_dir: str | None = None,
    test_dataloader: dict | None = None,
    test_evaluator: dict | list | None = None,
) -> nn.Module:
    """Quantizes a trained mmdet detector.

    Args:
        model: The float detector, e.g. from ``mmdet.apis.init_detector``; it is not changed.
        calibration_loader: Yields mmdet batches ``dict(inputs=[...], data_samples=[...])``.
        preset: Name of a preset. Defaults to ``'w8a8'``.
        ptq: Further keys of the ``ptq`` block. With ``export``, models for these runtimes are written, too. Defaults to
            None.
        work_dir: Keeps the integer checkpoint ``quantized.pth``, exported models and the logs. Defaults to None, which
            keeps nothing.
        test_dataloader: With ``test_evaluator``, float, quantized and exported detectors are evaluated and timed, and
            ``work_dir`` gets ``results.json`` and ``report.html``, as from the command line: a dataloader as configs
            have it, e.g. ``cfg.test_dataloader``. Defaults to None.
        test_evaluator: The same of the evaluator. Defaults to None.

    Returns:
        The quantized detector, rebuilt from its integer codes.

    Raises:
        PTQError: The preset or block is wrong, the loader yields nothing, the evaluation is incomplete, or models or
            results are to be written nowhere.
    """
    evaluation = dict(test_dataloader=test_dataloader, test_evaluator=test_evaluator)
    block = PTQConfig.from_dict(ptq or {}, preset=preset)
    if block.export and work_dir is None:
        raise PTQError('`ptq.export` writes models into `work_dir`; give `quantize` one.')
    if test_dataloader is None and test_evaluator is None:
        evaluation = {}
    elif not isinstance(test_dataloader, dict) or not isinstance(test_evaluator, dict | list):
        raise PTQError(
            '`quantize` evaluates with `test_dataloader` and `test_evaluator` as configs have them; give both, e.g. '
            '`cfg.test_dataloader` and `cfg.test_evaluator`.'
        )
    elif work_dir is None:
        raise PTQError('results and report go into `work_dir`; give `quantize` one, or leave the evaluation out.')
    else:
        evaluation |= dict(test_cfg=dict(type='TestLoop'), custom_hooks=[dict(type='mmdet_ptq.ProgressHook')])
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
            **evaluation,
        )
        if evaluation:
            runner.run()
        else:
            _export_all(runner, getattr(model, 'dataset_meta', None) or {})
            leave_work_dir(runner.work_dir)
        detector = runner.detector
    for name in ('cfg', 'dataset_meta'):
        if hasattr(model, name):
            setattr(detector, name, getattr(model, name))
    return detector


def _export_all(runner: PTQRunner, dataset_meta: dict) -> None:
    """Calibrates and exports to every runtime, without an evaluation."""
    runner.calibrate()
    for part in (runner, *map(runner.part, runner.other_blocks)):
        if part is not runner:
            part.calibrate()
        part.detector.dataset_meta = dataset_meta
        for name in part.ptq.export:
            folder, runtime = Path(runner.work_dir) / name, get_runtime(name)
            options = runner.export_options
            path = runtime.export(copy.deepcopy(part.detector).cpu(), folder, runner.input_shape, **options)
            print_log(f'{name}: {path}', 'current')
            exported = open_model(path)
            announce_coverage(name, exported.whole_coverage(), exported.evidence)
            export_detecting(part.detector, runtime, folder, runner.input_shape, runner.cfg, options)


def load_quantized(
    path: str | os.PathLike, config: Config | str | None = None, device: str = 'cpu', *, trust_config: bool = False
) -> nn.Module:
    """Loads a quantized detector, ready for ``mmdet.apis.inference_detector``.

    Args:
        path: A ``quantized.pth``.
        config: Replaces the config stored in the checkpoint.
        device: Where the detector goes. Defaults to ``'cpu'``.
        trust_config: Whether the stored config may import modules and name what nobody has registered, as the user's
            own may. Defaults to False: its model and its test pipeline are built from what mmdet and mmengine
            register, and the rest of it is left out.

    Returns:
        The detector in eval mode, its weights exactly the values of the integer codes.

    Raises:
        PTQError: The file is no quantized checkpoint, does not fit the config, or has a config that needs other code.
    """
    state = read_quantized(path)
    foreign = config is None and not trust_config
    if foreign:
        config = stored_config(state['config'], str(path))
    elif config is None:
        config = Config(state['config'])
    elif not isinstance(config, Config):
        config = Config.fromfile(str(config))
    if config.get('model') is None:
        raise PTQError(f'{str(path)!r} carries no model config; give `config`.')
    bounds = _bounds(state, str(path))
    detector = _build_foreign(config, str(path), bounds) if foreign else build_detector(config)
    with bounds():
        load_quantized_state(detector, state)
    if state.get('padded'):
        pad_to(detector, tuple(state['input_shape'][2:]))
    detector.cfg = config
    detector.dataset_meta = state['dataset_meta']
    detector.to(device).eval()
    return detector


def load_exported(path: str | os.PathLike, config: Config | str) -> nn.Module:
    """Loads an exported model, ready for ``mmdet.apis.inference_detector``: the runtime computes its network.

    Args:
        path: The model, as ``model.onnx`` or ``model.xml``.
        config: The config that it was exported from, or its file.

    Returns:
        The detector on the CPU, in eval mode.

    Raises:
        PTQError: There is no such model, no runtime reads it, or it was exported from another detector.
    """
    model = open_model(path)
    return runtime_detector(config if isinstance(config, Config) else Config.fromfile(str(config)), model)


def _bounds(state: dict, path: str) -> Callable[[], AbstractContextManager]:
    """What building a checkpoint's detector, and loading it, may take, by how many numbers the detector has."""
    numbers = declared_numbers(state)
    memory, seconds = LOADING + LOADING_PER_NUMBER * numbers, LOADING_SECONDS + numbers / NUMBERS_PER_SECOND
    return partial(bounded, f'loading {path!r}', memory, seconds)


def _build_foreign(config: Config, path: str, bounds: Callable[[], AbstractContextManager]) -> nn.Module:
    try:
        with bounds(), only_registered(path):
            return build_detector(config)
    except (PTQError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a constructor makes of arguments that are not its own
        told = ' '.join(str(error).split())[:200].rstrip('.')
        raise PTQError(
            f'the config inside {path!r} gives no detector ({type(error).__name__}: {told}); give the config file.'
        ) from error
