"""Evaluating a detector with the config's own test dataloader and evaluator."""

from __future__ import annotations

import copy
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from mmdet.evaluation.evaluator import MultiDatasetsEvaluator
from mmdet.evaluation.metrics import CocoMetric
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.mot import BaseMOTModel
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmengine.config import Config
from mmengine.logging import MMLogger, print_log
from mmengine.runner import Runner, TestLoop
from pycocotools.coco import COCO
from torch import nn
from torch.utils.data import Dataset, Sampler

from mmdet_ptq.calibration.annotations import TO_EVALUATE, check_annotation_file
from mmdet_ptq.calibration.image_files import check_pixels, glance, pixels
from mmdet_ptq.calibration.images import (
    annotation_fields,
    annotation_path,
    check_classes,
    check_pipeline,
    loader_sources,
)
from mmdet_ptq.deploy import first_images_exact
from mmdet_ptq.engine.stage_store import fingerprint
from mmdet_ptq.errors import PTQError, building, one_line
from mmdet_ptq.files import check_space, file_hash
from mmdet_ptq.progress import adopted
from mmdet_ptq.wrapping import is_quantized

_CHECK = 'check `test_dataloader.dataset` and `test_evaluator.ann_file`.'
NOTHING_FOUND = (
    'the float detector found nothing on the evaluation images, so that there are no figures; check '
    '`load_from`, the classes and the test pipeline.'
)
# settings of a dataloader that change no image
LOADING = ('num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'timeout')


def evaluate(cfg: Config, detector: nn.Module) -> dict[str, float]:
    """Runs mmdet's test loop; a quantized detector computes as integer kernels do, on the first 1,000 images.

    Args:
        cfg: The config whose ``test_dataloader`` and ``test_evaluator`` are used; ``work_dir`` must be set.
        detector: The detector, float or quantized.

    Returns:
        Every figure of the evaluator.

    Raises:
        PTQError: The config has no evaluation, or one of its files is missing.
    """
    for key in ('test_dataloader', 'test_evaluator'):
        if not cfg.get(key):
            raise PTQError(f'the config has no `{key}`, which detectors are evaluated with.')
    check_space(cfg['work_dir'], 0)
    with building(cfg):
        runner = LoggedRunner(model=detector, **evaluation_arguments(cfg))
    loop = build_evaluation(cfg, lambda: runner.test_loop)
    check_evaluation(loop, detector)
    runner.logger.info(f'{len(loop.dataloader.dataset)} evaluation images')
    with first_images_exact(detector) if is_quantized(detector) else nullcontext(), naming_images(loop):
        return figures(runner.test())


class LoggedRunner(Runner):
    """mmengine's, which shows warnings alone where a person looks on."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        return adopted(super().build_logger(*args, **kwargs))


def evaluation_arguments(cfg: Config) -> dict[str, Any]:
    """What mmengine's runner is built with besides the model; what only training needs is left out."""
    return dict(
        work_dir=cfg['work_dir'],
        test_dataloader=cfg['test_dataloader'],
        test_evaluator=cfg['test_evaluator'],
        test_cfg=_test_loop_cfg(cfg),
        default_hooks=_evaluation_hooks(cfg.get('default_hooks')),
        custom_hooks=[dict(type='mmdet_ptq.ProgressHook')],
        launcher=cfg.get('launcher', 'none'),
        env_cfg=cfg.get('env_cfg', dict(dist_cfg=dict(backend='nccl'))),
        log_processor=dict(type='LogProcessor', window_size=10, by_epoch=False),
        log_level=cfg.get('log_level', 'INFO'),
        visualizer=cfg.get('visualizer'),
        default_scope=cfg.get('default_scope') or 'mmdet',
        cfg=cfg,
    )


def build_evaluation(cfg: Config, build: Callable[[], TestLoop]) -> TestLoop:
    """Builds the test loop; what the config or its annotation files get wrong becomes one sentence.

    Args:
        cfg: The config.
        build: Builds the loop.

    Raises:
        PTQError: A part of the config cannot be built, or a file is missing or damaged.
    """
    sources = loader_sources(cfg, 'test_dataloader')
    for key in ('sampler', 'batch_sampler'):
        value = cfg['test_dataloader'].get(key)
        # mmengine takes anything for a sampler, and a text for one that gives letters
        if not isinstance(value, dict | Sampler | None):
            raise PTQError(f'`test_dataloader.{key}` must be a dict with a `type`, got {value!r:.100}.')
    for source in sources:
        check_classes(source, 'test_dataloader.dataset')
        check_pipeline(source, 'test_dataloader.dataset')
        if any('TestTimeAug' in str(step.get('type')) for step in source.get('pipeline') or []):
            raise PTQError(
                '`test_dataloader.dataset.pipeline` has TestTimeAug, which makes several images of one; use the '
                'plain test pipeline, and keep augmentations in `tta_pipeline`.'
            )
    with building(cfg, 'test_dataloader', 'test_evaluator'), evaluation_files():
        for source in sources:
            fields = annotation_fields(source)
            if fields is not None and Path(annotation_path(source)).is_file():
                check_annotation_file(annotation_path(source), 'test_dataloader.dataset.ann_file', fields)
        for metric in _metrics(cfg['test_evaluator']):
            if str(metric.get('type')).endswith('CocoMetric') and Path(str(metric.get('ann_file'))).is_file():
                check_annotation_file(metric['ann_file'], 'test_evaluator.ann_file', TO_EVALUATE)
        return build()


def _metrics(evaluator: Any) -> list[dict]:
    if isinstance(evaluator, list | tuple):
        return [metric for part in evaluator for metric in _metrics(part)]
    return _metrics(evaluator['metrics']) if 'metrics' in evaluator else [evaluator]


def _test_loop_cfg(cfg: Config) -> dict:
    """The config's test loop, in single precision: integers beyond 2048 are not exact in half of it."""
    loop = cfg.get('test_cfg') or dict(type='TestLoop')
    if not isinstance(loop, dict):
        raise PTQError(f"`test_cfg` must be a dict, as dict(type='TestLoop'), got {loop!r:.100}.")
    loop = dict(loop)
    if loop.pop('fp16', False):
        print_log('`test_cfg.fp16` is left out: float and quantized detectors are evaluated in float32.', 'current')
    return loop


def evaluation_inputs(cfg: Config, dataset: Dataset) -> str:
    """Hash of what an evaluation's figures depend on.

    That is the test dataloader, however its images are loaded, the loop, the evaluator with the content of the files
    that it names, and the data set's records with size and time of their images.

    Args:
        cfg: The config.
        dataset: The data set of its test dataloader.
    """
    loader = {key: value for key, value in (cfg.get('test_dataloader') or {}).items() if key not in LOADING}
    count = len(dataset) if hasattr(dataset, 'get_data_info') else 0
    return fingerprint(
        str(loader),
        str(cfg.get('test_cfg')),
        str(cfg.get('test_evaluator')),
        [file_hash(path) for path in _named_files(cfg.get('test_evaluator'))],
        [_record(dataset.get_data_info(index)) for index in range(count)],
    )


def _named_files(value: object) -> list[str]:
    """The files among a config's values."""
    if isinstance(value, dict):
        return [path for item in value.values() for path in _named_files(item)]
    if isinstance(value, list | tuple):
        return [path for item in value for path in _named_files(item)]
    return [value] if isinstance(value, str) and Path(value).is_file() else []


def _record(info: dict) -> list[str]:
    path = Path(str(info.get('img_path')))
    known = path.stat() if path.is_file() else None
    return [str(sorted(info.items())), *([] if known is None else [str(known.st_size), str(known.st_mtime_ns)])]


@contextmanager
def evaluation_files() -> Iterator[None]:
    """Turns a missing, empty or broken file of the evaluation's data or metrics into one sentence.

    Raises:
        PTQError: The file is missing, names no image or is no JSON.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PTQError(
            f'the evaluation needs the file {str(error.filename or error)!r}, which does not exist; {_CHECK}'
        ) from error
    except json.JSONDecodeError as error:
        raise PTQError(f'an annotation file of the evaluation is no valid JSON ({error}); {_CHECK}') from error
    except ValueError as error:
        if 'need at least one array' not in str(error):  # mmengine joining the records of no image
            raise
        raise PTQError(f'the evaluation has no images; {_CHECK}') from error


def check_evaluation(loop: TestLoop, detector: nn.Module) -> None:
    """Checks before anything that takes long that images, classes and annotations of an evaluation fit together.

    Args:
        loop: The built test loop.
        detector: The detector, for its number of classes.

    Raises:
        PTQError: There is no image, the first one cannot be read, or the evaluator's annotations lack classes or
            images of the dataset.
    """
    dataset = loop.dataloader.dataset
    if not len(dataset):
        raise PTQError(f'the evaluation has no images; {_CHECK}')
    with evaluation_files():
        _read(dataset, 0)
        _check_images(dataset)
    classes = dataset_meta(dataset).get('classes')
    known = next(
        (
            module.num_classes
            for module in detector.modules()
            if isinstance(module, BaseDenseHead | BBoxHead) and hasattr(module, 'num_classes')
        ),
        None,
    )
    if classes is not None and known is not None and len(classes) < known:
        print_log(
            f'the detector has {known} classes, `test_dataloader.dataset.metainfo.classes` names {len(classes)}; '
            'evaluators that look for the others fail.',
            'current',
            level=logging.WARNING,
        )
    metrics = loop.evaluator.metrics
    # MultiDatasetsEvaluator gives each metric the images of its own part
    parts = dataset.datasets if isinstance(loop.evaluator, MultiDatasetsEvaluator) else [dataset] * len(metrics)
    for metric, part in zip(metrics, parts, strict=False):
        annotations = getattr(metric, '_coco_api', None)
        if annotations is not None:
            _check_annotations(annotations, part)
    _rehearse(loop, detector)
    if _only_writes_files(loop):
        print_log(
            '`test_evaluator.format_only` writes detections to files and gives no figures.',
            'current',
            level=logging.WARNING,
        )


def _read(dataset: Dataset, index: int) -> Any:
    try:
        return dataset[index]
    except (FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # of any step of the pipeline
        info = dataset.get_data_info(index) if hasattr(dataset, 'get_data_info') else {}
        named = f'the evaluation image {info["img_path"]}' if 'img_path' in info else f'evaluation image {index}'
        raise PTQError(f'{named} cannot be read: {one_line(error)}; check `test_dataloader.dataset`.') from error


@contextmanager
def naming_images(loop: TestLoop) -> Iterator[None]:
    """Names the image that a data loader fails at in the middle of an evaluation, which the head of its file hid.

    Args:
        loop: The test loop.

    Raises:
        PTQError: An image cannot be read.
    """
    try:
        yield
    except PTQError:
        raise
    except Exception as error:
        if any(Path(frame.f_code.co_filename).name == 'dataloader.py' for frame, _ in walk_tb(error.__traceback__)):
            for index in range(len(loop.dataloader.dataset)):
                _read(loop.dataloader.dataset, index)
        raise


def _check_images(dataset: Dataset) -> None:
    """Reads the images that look as if they could not be, or as if they were of another kind; files tell by themselves.

    Raises:
        PTQError: An image cannot be read, is cut short, or has other channels than the first.
    """
    infos = [dataset.get_data_info(index) for index in range(len(dataset))] if hasattr(dataset, 'get_data_info') else []
    paths = [str(info.get('img_path')) for info in infos]
    if not paths or not Path(paths[0]).is_file():  # what is fetched from elsewhere is not fetched twice
        return
    first, seen = pixels(_read(dataset, 0)), set()
    for index, path in enumerate(paths):
        found = glance(path)
        if found is not None and found.torn:
            raise PTQError(
                f'the evaluation image {path} cannot be read: {found.torn}; put the whole file in its place, or take '
                'it out of the annotation file.'
            )
        mode = None if found is None else found.kind[1]
        if mode is None or mode not in seen:
            seen.add(mode)
            check_pixels(pixels(_read(dataset, index)), first, f'the evaluation image {path}', paths[0])


@torch.no_grad()
def _rehearse(loop: TestLoop, detector: nn.Module) -> None:
    """Takes one image through the detector and the metrics, which tell only then what they miss."""
    evaluator, dataset = loop.evaluator, loop.dataloader.dataset
    if isinstance(detector, BaseMOTModel) or isinstance(evaluator, MultiDatasetsEvaluator):
        return  # they keep what they saw
    batch = loop.dataloader.collate_fn([dataset[0]])
    try:
        detector.eval()
        found = detector.test_step(copy.deepcopy(batch))
        evaluator.process(data_samples=found, data_batch=batch)
        for metric in evaluator.metrics:
            if type(metric) is CocoMetric:  # others may need all images
                _rehearse_figures(metric)
    except PTQError:
        raise
    except Exception as error:  # of the detector's, or the metric's, own code
        raise PTQError(
            f'the first evaluation image fails in the detector or in `test_evaluator`: {one_line(error)}.'
        ) from error
    finally:
        for metric in evaluator.metrics:
            metric.results.clear()
    for metric in evaluator.metrics:
        masks = isinstance(metric, CocoMetric) and 'segm' in metric.metrics
        if masks and any('masks' not in sample.get('pred_instances', {}) for sample in found):
            raise PTQError(
                "`test_evaluator.metric` asks for 'segm', and the detector predicts boxes, no masks; leave it out."
            )


def _rehearse_figures(metric: CocoMetric) -> None:
    """Computes the figures of the image that a metric has seen, which tells only then what it was asked for in vain."""
    metric, (truth, found) = copy.copy(metric), metric.results[0]
    if metric.format_only or 'segm' in metric.metrics:
        return
    # a box, so that there is something to count
    found = {**found, 'bboxes': np.float32([[0, 0, 8, 8]]), 'scores': np.float32([0.5]), 'labels': np.array([0])}
    metric.img_ids, metric.outfile_prefix = [found['img_id']], None
    with redirect_stdout(io.StringIO()):
        metric.compute_metrics([(truth, found)])


def _only_writes_files(loop: TestLoop) -> bool:
    # as for test sets without public annotations
    return all(getattr(metric, 'format_only', False) for metric in loop.evaluator.metrics)


def check_figures(found: dict[str, float], loop: TestLoop) -> None:
    """Warns where the float detector's evaluation gave no figures and should have."""
    if not found and not _only_writes_files(loop):
        print_log(NOTHING_FOUND, 'current', level=logging.WARNING)


def _check_annotations(annotations: COCO, dataset: Dataset) -> None:
    classes = dataset_meta(dataset).get('classes') or ()
    names = [category['name'] for category in annotations.cats.values()]
    missing = [name for name in classes if name not in names]
    if missing:
        raise PTQError(
            f'`test_dataloader.dataset.metainfo.classes` names {", ".join(map(repr, missing[:3]))}'
            f'{", ..." * (len(missing) > 3)}, which `test_evaluator.ann_file` does not have; its '
            f'categories are {", ".join(names[:10])}{", ..." * (len(names) > 10)}.'
        )
    if hasattr(dataset, 'get_data_info'):
        images = set(annotations.getImgIds())
        strange = [dataset.get_data_info(index).get('img_id') for index in range(len(dataset))]
        strange = [name for name in strange if name not in images]
        if strange:
            raise PTQError(
                f'{len(strange)} of {len(dataset)} evaluation images, the first with the id '
                f'{strange[0]!r}, are not in `test_evaluator.ann_file`; it must be the annotation file '
                'of `test_dataloader.dataset`.'
            )


def dataset_meta(dataset: Dataset | None) -> dict:
    """What a data set says of its classes; the first part's where the parts of a concatenation differ."""
    meta = getattr(dataset, 'metainfo', None) or {}
    return meta[0] if isinstance(meta, list) else meta


def image_sizes(dataset: Dataset | None) -> set[tuple[int, int]]:
    """Heights and widths of what a data set's pipeline gives; of images that are alike only the first is read."""
    first: dict[object, int] = {}
    for index in range(0 if dataset is None else len(dataset)):
        info = dataset.get_data_info(index) if hasattr(dataset, 'get_data_info') else {}
        known = (info['height'], info['width']) if 'height' in info and 'width' in info else index
        found = glance(str(info.get('img_path')))
        # what annotations say of the size may be wrong, and pipelines may use it all the same
        first.setdefault(known if found is None else (found.kind, known), index)
    return {tuple(_read(dataset, index)['inputs'].shape[-2:]) for index in first.values()}


def figures(metrics: dict) -> dict[str, float]:
    """What an evaluator returned, as numbers; what is none of them is told and left out."""
    numbers = {}
    for key, value in metrics.items():
        try:
            numbers[key] = float(value)
        except (TypeError, ValueError):
            print_log(
                f'{key} of the evaluator is no number and is left out: {str(value)[:80]}',
                'current',
                level=logging.WARNING,
            )
    return numbers


def _evaluation_hooks(hooks: dict | None) -> dict:
    """The user's default hooks without those that only training needs."""
    training = ('checkpoint', 'param_scheduler')
    return {**{name: hook for name, hook in (hooks or {}).items() if name not in training}, **dict.fromkeys(training)}
