"""Calibration images: drawn from the training set, read through the test pipeline, never from the evaluation set."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.logging import print_log
from torch.utils.data import Dataset, Subset

from mmdet_ptq.calibration.annotations import TO_LOAD, TO_LOAD_LVIS, check_annotation_file, complete, no_json
from mmdet_ptq.calibration.image_files import check_pixels, glance, pixels
from mmdet_ptq.config import CalibrationConfig
from mmdet_ptq.errors import PTQError, building
from mmdet_ptq.files import file_hash
from mmdet_ptq.progress import track

IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.tif', '.tiff', '.webp'}
# Decoded samples are kept in memory up to this size; beyond it they are read again for every batch.
MEMORY_LIMIT = 2 << 30


def inner_dataset_cfgs(cfg: dict) -> list[dict]:
    """Unwraps RepeatDataset, ClassBalancedDataset, MultiImageMixDataset and ConcatDataset configs.

    Args:
        cfg: A dataset config.

    Returns:
        The configs of the datasets that read images, in order.
    """
    if not isinstance(cfg, dict):
        raise PTQError(f'a `dataset` of the config must be a dict with a `type`, got {cfg!r:.100}.')
    if isinstance(cfg.get('datasets'), list | tuple):
        return [inner for part in cfg['datasets'] for inner in inner_dataset_cfgs(part)]
    if 'dataset' in cfg:
        return inner_dataset_cfgs(cfg['dataset'])
    return [cfg]


def loader_sources(cfg: dict, key: str) -> list[dict]:
    """The configs of the datasets that a data loader of the config reads, see :func:`inner_dataset_cfgs`.

    Args:
        cfg: The whole config.
        key: Names the loader.

    Raises:
        PTQError: It has no dataset.
    """
    if cfg[key].get('dataset') is None:
        raise PTQError(f'`{key}` has no `dataset`; add it.')
    return inner_dataset_cfgs(cfg[key]['dataset'])


def test_pipeline(cfg: dict) -> list[dict]:
    """The pipeline of the config's test dataset.

    Args:
        cfg: The whole config.

    Raises:
        PTQError: The config has no test pipeline.
    """
    for key in ('test_dataloader', 'val_dataloader'):
        if cfg.get(key):
            inner = loader_sources(cfg, key)[0]
            check_pipeline(inner, f'{key}.dataset')
            if inner.get('pipeline'):
                return copy.deepcopy(list(inner['pipeline']))
    raise PTQError('the config has no `test_dataloader.dataset.pipeline`, which calibration images are read through.')


class FolderDataset(Dataset):
    """Images of a folder, without annotations.

    Args:
        folder: Searched recursively; files are taken in sorted order.
        pipeline: Test pipeline without annotation loading.
    """

    def __init__(self, folder: str, pipeline: Sequence[dict]) -> None:
        if not Path(folder).is_dir():
            raise PTQError(f'`ptq.calibration.images` names {folder!r}, which is no folder.')
        files = (p for p in Path(folder).rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        self.paths = sorted(map(str, files))
        self.pipeline = Compose(pipeline)

    def __len__(self) -> int:
        return len(self.paths)

    def get_data_info(self, index: int) -> dict:
        return dict(img_path=self.paths[index], img_id=self.paths[index])

    def __getitem__(self, index: int) -> Any:
        return self.pipeline(self.get_data_info(index))


def without_annotations(pipeline: list[dict]) -> list[dict]:
    """A pipeline that reads images alone."""
    return [step for step in pipeline if 'LoadAnnotations' not in str(step['type'])]


def _with_annotations(pipeline: list[dict]) -> list[dict]:
    """Loads the boxes right after the image, so that what resizes the image resizes them, too.

    mmdet's test pipelines load them last: its metrics want boxes in pixels of the original image.
    """
    steps = without_annotations(pipeline)
    loads = [step for step in pipeline if step not in steps] or [dict(type='LoadAnnotations', with_bbox=True)]
    images = [i for i, step in enumerate(steps) if 'Load' in str(step['type'])]
    return steps[: images[-1] + 1] + loads + steps[images[-1] + 1 :] if images else loads + steps


def source_datasets(cfg: dict, calibration: CalibrationConfig, annotated: bool = False) -> list[Dataset]:
    """Builds the datasets that calibration images are drawn from.

    Args:
        cfg: The whole config.
        calibration: The ``ptq.calibration`` block.
        annotated: Whether the samples need ``gt_instances``, in pixels of the network input. Defaults to False.

    Raises:
        PTQError: A file or folder is missing, there is no training set, or images of a folder need annotations.
    """
    from mmdet.registry import DATASETS

    pipeline = test_pipeline(cfg)
    if annotated:
        if calibration.images is not None:
            raise PTQError(
                "`ptq.global_loss.target='ground_truth'` needs annotations, which the folder "
                "`ptq.calibration.images` has not; use target='float' or set `ptq.calibration.dataset`."
            )
        pipeline = _with_annotations(pipeline)
    if calibration.images is not None:
        return [FolderDataset(calibration.images, without_annotations(pipeline))]
    if calibration.dataset is not None:
        key, sources = 'ptq.calibration.dataset', inner_dataset_cfgs(calibration.dataset)
    elif cfg.get('train_dataloader'):
        key, sources = 'train_dataloader.dataset', loader_sources(cfg, 'train_dataloader')
    else:
        raise PTQError(
            'the config has no `train_dataloader` to calibrate on; set `ptq.calibration.images` to a folder of images.'
        )
    datasets = []
    for source in sources:
        # test mode: nothing is filtered and an unreadable image is not replaced by another in silence
        source = {**copy.deepcopy(dict(source)), 'pipeline': pipeline, 'test_mode': True}
        source.pop('filter_cfg', None)  # XMLDataset, of VOC and WIDER FACE, refuses one in test mode
        check_classes(source, key)
        path, cls, fields = annotation_path(source), coco_class(source), annotation_fields(source)
        if fields is not None and (annotated or cls is None) and Path(path).is_file():
            check_annotation_file(path, f'{key}.ann_file', fields)
        if cls is not None:
            source['type'] = cls if annotated else _images_of(cls, f'`{key}`: the annotation file {path!r}')
        with building(cfg):
            datasets.append(build_dataset(DATASETS, source, key))
    return datasets


def check_classes(cfg: dict, key: str) -> None:
    """Refuses class names without a comma, which Python takes for one text."""
    meta = cfg.get('metainfo') or {}
    if not isinstance(meta, dict):
        raise PTQError(f'`{key}.metainfo` must be a dict, as dict(classes=(...)), got {meta!r:.100}.')
    classes = meta.get('classes')
    if isinstance(classes, str) and not Path(classes).is_file():
        raise PTQError(
            f"`{key}.metainfo.classes` is the text '{classes}', and must be a tuple; a comma is missing: "
            f"('{classes}',)."
        )


def check_pipeline(cfg: dict, key: str) -> None:
    """Refuses a pipeline of a dataset config whose steps are no dicts with a type."""
    pipeline = cfg.get('pipeline') or []
    if not isinstance(pipeline, list | tuple):
        raise PTQError(f'`{key}.pipeline` must be a list of steps, got {pipeline!r:.100}.')
    for place, step in enumerate(pipeline):
        if not isinstance(step, dict) or step.get('type') is None:
            raise PTQError(f'`{key}.pipeline[{place}]` must be a dict with a `type`, got {step!r:.100}.')


def coco_class(cfg: dict) -> type | None:
    """The class of a dataset config, if it reads annotation files as mmdet's ``CocoDataset`` does."""
    from mmdet.datasets import CocoDataset

    return _reading_as(CocoDataset, cfg)


def annotation_fields(cfg: dict) -> Mapping | None:
    """What the class of a dataset config reads of its annotation file, see :mod:`.annotations`; None if not known."""
    from mmdet.datasets import CocoDataset, LVISV05Dataset, LVISV1Dataset

    kinds = ((CocoDataset, TO_LOAD), (LVISV05Dataset, TO_LOAD), (LVISV1Dataset, TO_LOAD_LVIS))
    return next((fields for kind, fields in kinds if _reading_as(kind, cfg) is not None), None)


def _reading_as(kind: type, cfg: dict) -> type | None:
    """The class of a dataset config, if it reads files as a class of mmdet does."""
    from mmdet.registry import DATASETS

    cls = DATASETS.get(cfg['type']) if isinstance(cfg.get('type'), str) else cfg.get('type')
    if not isinstance(cls, type) or not issubclass(cls, kind):
        return None
    return cls if cls.load_data_list is kind.load_data_list else None


def annotation_path(cfg: dict) -> str:
    """The annotation file of a dataset config, as mmengine joins it."""
    return str(Path(cfg.get('data_root') or '', cfg.get('ann_file') or ''))


def _images_of(cls: type, what: str) -> type:
    """A dataset of the same images that asks their annotations for nothing that calibration does not need."""

    class Complete(cls.COCOAPI):
        def createIndex(self) -> None:
            complete(self.dataset, what)
            super().createIndex()

    return type(cls.__name__, (cls,), dict(COCOAPI=Complete))


def build_dataset(registry, cfg: dict, key: str) -> Dataset:
    """Builds a dataset; a missing annotation file becomes one sentence.

    Args:
        registry: mmdet's dataset registry.
        cfg: The dataset config.
        key: Where it stands in the config, for the message.
    """
    try:
        dataset = registry.build(cfg)
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        return dataset
    except (FileNotFoundError, NotADirectoryError) as error:
        path = error.filename or error
        raise PTQError(
            f'`{key}` needs the file {str(path)!r}, which does not exist; check `data_root` and `ann_file`.'
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PTQError(no_json(f'`{key}`: the annotation file {annotation_path(cfg)!r}', error)) from error
    except ValueError as error:
        if 'need at least one array' not in str(error):  # mmengine joining the records of no image
            raise
        raise PTQError(
            f'the calibration set is empty: `{key}` names no image; check `data_root` and `ann_file`.'
        ) from error


def image_path(info: dict) -> str:
    """The real path of a sample's image."""
    return os.path.realpath(info.get('img_path') or str(info['img_id']))


def check_no_overlap(chosen: Sequence[dict], evaluation: Dataset) -> None:
    """Refuses calibration images that are also evaluation images, or copies of them byte by byte.

    Args:
        chosen: Data infos of the calibration images.
        evaluation: The evaluation dataset (with ``get_data_info``).

    Raises:
        PTQError: At least one image is in both.
    """
    evaluated = {image_path(evaluation.get_data_info(i)) for i in range(len(evaluation))}
    mine = {image_path(info) for info in chosen}
    both = sorted(mine & evaluated) or _copies(mine, evaluated)
    if both:
        raise PTQError(
            f'{len(both)} calibration images are also evaluation images, or copies of them (first: '
            f'{Path(both[0]).name}); calibrate on the training set: set `ptq.calibration.dataset` or '
            '`train_dataloader` to other images.'
        )


def _copies(paths: set[str], others: set[str]) -> list[str]:
    """Files that are equal, byte by byte, to one of the others; few are read as a whole."""
    mine = {path: _glimpse(path) for path in map(Path, paths) if path.is_file()}
    sizes, glimpses = {size for size, _ in mine.values()}, set(mine.values())
    alike = [path for path in map(Path, others) if path.is_file() and path.stat().st_size in sizes]
    contents = {file_hash(path) for path in alike if _glimpse(path) in glimpses}
    return sorted(str(path) for path in mine if contents and file_hash(path) in contents)


def _glimpse(path: Path) -> tuple[int, bytes]:
    """A file's size and a piece of its middle, which tells images of one size apart."""
    size = path.stat().st_size
    with path.open('rb') as file:
        file.seek(size // 2)
        return size, file.read(1024)


def content_hash(digest: Any, sample: dict) -> None:
    """Adds to a hash what calibration reads of a sample: its image, and its boxes where it has any.

    Args:
        digest: A hash of :mod:`hashlib`.
        sample: What a test pipeline returns.
    """
    # mmengine keeps the names of the fields in a set, whose order is another in every process
    annotations = sorted(getattr(sample['data_samples'], 'gt_instances', {}).items())
    for name, value in (('inputs', sample['inputs']), *annotations):
        value = getattr(value, 'tensor', value)
        if isinstance(value, torch.Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy())


class CalibrationDataset(Dataset):
    """A fixed, seeded draw of readable images.

    Args:
        datasets: Where images are drawn from.
        num_images: How many to draw; all there are, if fewer.
        seed: Seed of the draw.
        evaluation: Evaluation dataset that must not share an image.

    Attributes:
        ids: Image ids, in the order of the draw.
        skipped: Paths of images that could not be read.
        sizes: (height, width) as the pipeline gives them, to the position of the first image that has it.
        content: SHA-256 of the images as the pipeline gives them, and of their boxes.

    Raises:
        PTQError: There is no image, all are unreadable, or one is an evaluation image.
    """

    def __init__(
        self, datasets: Sequence[Dataset], num_images: int, seed: int, evaluation: Dataset | None = None
    ) -> None:
        self.datasets = list(datasets)
        index = [(d, i) for d, dataset in enumerate(self.datasets) for i in range(len(dataset))]
        if not index:
            raise PTQError('the calibration set is empty; check `train_dataloader.dataset` or `ptq.calibration`.')
        if len(index) < num_images:
            print_log(
                f'only {len(index)} calibration images exist, {num_images} were asked for '
                '(`ptq.calibration.num_images`)',
                'current',
                level=logging.WARNING,
            )
        order = np.random.default_rng(seed).permutation(len(index))[:num_images]
        chosen = [index[i] for i in order]
        infos = [self.datasets[d].get_data_info(i) for d, i in chosen]
        if evaluation is not None:
            check_no_overlap(infos, evaluation)
        self._read(chosen, infos)

    def _read(self, chosen: list[tuple[int, int]], infos: list[dict]) -> None:
        self.index, self.ids, self.skipped, self._samples, size = [], [], [], [], 0
        self.sizes: dict[tuple[int, int], int] = {}
        digest, first = hashlib.sha256(), None
        print_log(f'reading {len(chosen)} calibration images', 'current')
        for (d, i), info in track(list(zip(chosen, infos, strict=True)), 'reading images'):
            try:
                found = glance(image_path(info))
                if found is not None and found.torn:
                    raise OSError(found.torn)
                sample = self.datasets[d][i]
                if sample is None:
                    raise OSError('the pipeline returned nothing')
            except Exception as error:  # any decoder or transform may fail in its own way; the image is named
                self.skipped.append(image_path(info))
                print_log(
                    f'calibration image {image_path(info)} cannot be read and is skipped: '
                    f'{type(error).__name__}: {error}',
                    'current',
                    level=logging.WARNING,
                )
                continue
            first = first or (pixels(sample), image_path(info))
            check_pixels(pixels(sample), first[0], f'the calibration image {image_path(info)}', first[1])
            content_hash(digest, sample)
            self.sizes.setdefault(tuple(sample['inputs'].shape[-2:]), len(self.index))
            self.index.append((d, i))
            self.ids.append(info.get('img_id', image_path(info)))
            size += sample['inputs'].numel() * sample['inputs'].element_size()
            if self._samples is not None:
                self._samples.append(sample)
                if size > MEMORY_LIMIT:
                    self._samples = None
        self.content = digest.hexdigest()
        if not self.index:
            raise PTQError(f'none of the {len(chosen)} calibration images can be read (first: {self.skipped[0]}).')
        if self.skipped:
            print_log(
                f'{len(self.skipped)} of {len(chosen)} calibration images were skipped',
                'current',
                level=logging.WARNING,
            )

    @property
    def metainfo(self) -> dict:
        """Class names and palette of the first dataset."""
        return getattr(self.datasets[0], 'metainfo', {})

    def part(self, positions: Sequence[int]) -> Subset:
        """Some of the images, by position."""
        subset = Subset(self, positions)
        subset.metainfo = self.metainfo
        return subset

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict:
        if self._samples is not None:
            # detectors write predictions into the data samples they are given
            return copy.copy(self._samples[position]) | {
                'data_samples': copy.deepcopy(self._samples[position]['data_samples'])
            }
        d, i = self.index[position]
        return self.datasets[d][i]


class LoadedSamples(CalibrationDataset):
    """The images of a dataloader the user made, taken out of their batches.

    Args:
        batches: Yields mmdet batches ``dict(inputs=[...], data_samples=[...])``.

    Raises:
        PTQError: There is no batch.
    """

    def __init__(self, batches: Any) -> None:
        self.datasets, self.skipped, self._samples, self.sizes = [], [], [], {}
        digest = hashlib.sha256()
        for batch in batches:
            for inputs, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
                self.sizes.setdefault(tuple(inputs.shape[-2:]), len(self._samples))
                self._samples.append(dict(inputs=inputs, data_samples=sample))
                content_hash(digest, self._samples[-1])
        self.content = digest.hexdigest()
        if not self._samples:
            raise PTQError('the calibration loader is empty; give one that yields mmdet batches.')
        self.index = list(range(len(self._samples)))
        self.ids = [sample['data_samples'].metainfo.get('img_id', i) for i, sample in enumerate(self._samples)]

    @property
    def metainfo(self) -> dict:
        return {}
