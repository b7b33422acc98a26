"""The distinct architectures of mmdet's own configs: one config for each, standing for all that are built alike."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import mmdet
from mmengine.config import Config
from torch import nn

from mmdet_ptq.deploy import build_detector

# where an installed mmdet keeps its configs, and where a clone does
FOLDERS = (Path(mmdet.__file__).parent / '.mim' / 'configs', Path(mmdet.__file__).parent.parent / 'configs')
PARTS = ('backbone', 'neck', 'rpn_head', 'bbox_head', 'roi_head', 'mask_head', 'panoptic_head', 'query_head')


@dataclass
class Architecture:
    """Configs that build detectors of the same classes.

    Attributes:
        key: Class of the detector, classes of its parts, classes of what holds weights.
        config: The config with the fewest weights, relative to mmdet's folder.
        configs: How many configs there are.
        million: Its weights.
    """

    key: str
    config: str
    configs: int
    million: float


def config_folder() -> Path:
    """Where mmdet's configs are."""
    return next(folder for folder in FOLDERS if folder.is_dir())


def zoo_config(name: str) -> Config:
    """A config of mmdet's, without the weights that it would download."""
    config = Config.fromfile(str(config_folder() / name))
    _without_weights(config['model'])
    for key in ('teacher_config',):  # a path as seen from a clone of mmdet
        if isinstance(config['model'].get(key), str):
            config['model'][key] = str(config_folder().parent / config['model'][key])
    model = config['model']
    if 'detector' in model:  # a tracker: its detector is what is quantized
        preprocessor = model.get('data_preprocessor', {})
        kept = {
            key: preprocessor[key] for key in ('mean', 'std', 'bgr_to_rgb', 'pad_size_divisor') if key in preprocessor
        }
        config['model'] = {'data_preprocessor': dict(type='DetDataPreprocessor', **kept), **model['detector']}
    return config


def _without_weights(value: object) -> None:
    if isinstance(value, dict):
        for key in ('init_cfg', 'pretrained', 'teacher_ckpt'):
            if key in value:
                value[key] = None
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _without_weights(item)


def architecture_key(detector: nn.Module) -> str:
    """Classes of a detector, its parts and the modules that hold weights themselves."""
    parts = [f'{name}={type(getattr(detector, name)).__name__}' for name in PARTS if hasattr(detector, name)]
    for owner in ('bbox_head', 'mask_head'):
        head = getattr(getattr(detector, 'roi_head', None), owner, None)
        if head is not None:
            heads = head if isinstance(head, nn.ModuleList) else [head]
            parts.append(f'{owner}=' + '+'.join(sorted({type(h).__name__ for h in heads})))
    leaves = {type(m).__name__ for m in detector.modules() if next(m.parameters(recurse=False), None) is not None}
    return ' '.join([type(detector).__name__, *parts, '|'.join(sorted(leaves))])


@contextlib.contextmanager
def quick_build() -> Iterator[None]:
    """Building takes the weights as memory has them: drawing them takes most of the time."""
    names = [name for name in dir(nn.init) if name.endswith('_') and not name.startswith('_')]
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *args, **kwargs: tensor for name in names}):
        yield


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def without_folders(said: str) -> str:
    """A message without the folders of the machine that it was said on."""
    return re.sub(r'(?<![\w.])/(?:[\w.\-]+/)+', '', said)


def find_architectures(tell=print) -> tuple[list[Architecture], dict[str, str]]:
    """Builds every config of mmdet.

    Returns:
        The architectures, and what does not build with the reason.
    """
    found: dict[str, Architecture] = {}
    failed: dict[str, str] = {}
    folder = config_folder()
    for path in sorted(folder.rglob('*.py')):
        name = str(path.relative_to(folder))
        if name.startswith('_base_'):
            continue
        try:
            # some name others' configs from mmdet's own folder
            with warnings.catch_warnings(), quick_build(), _inside(folder.parent):
                warnings.simplefilter('ignore')
                if not Config.fromfile(str(path)).get('model', {}).get('type'):
                    continue
                detector = build_detector(zoo_config(name))
        except Exception as error:  # whatever mmdet's own configs do
            failed[name] = without_folders(f'{type(error).__name__}: {" ".join(str(error).split())}')[:160]
            continue
        key = architecture_key(detector)
        million = sum(p.numel() for p in detector.parameters()) / 1e6
        known = found.setdefault(key, Architecture(key, name, 0, million))
        known.configs += 1
        if million < known.million:
            known.config, known.million = name, million
        tell(f'{name}: {len(found)} architectures')
    return sorted(found.values(), key=lambda a: a.config), failed
