"""The config inside a file, as data: what of it may be built, and only of what mmdet and mmengine have registered."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import Config
from mmengine.registry import Registry

from mmdet_ptq.errors import PTQError, did_you_mean
from mmdet_ptq.registry import SCOPE, name_by_path

SCOPES = ('mmdet', 'mmengine', SCOPE)
# packages whose modules a config may name, once they are imported
_LIBRARIES = ('mmdet', 'mmengine', 'mmcv', SCOPE)
WAY_OUT = 'give the config file, or say trust_config=True (--trust-config) if you trust this file'
# functions and classes of mmcv that heads look up by name, outside of registries
_OPERATIONS = {
    'nms': ('nms', 'soft_nms', 'nms_match', 'nms_rotated', 'nms_quadri'),
    'roi_align': ('RoIAlign',),
    'roi_pool': ('RoIPool',),
    'roi_align_rotated': ('RoIAlignRotated',),
    'riroi_align_rotated': ('RiRoIAlignRotated',),
    'point_sample': ('SimpleRoIAlign',),
    'deform_roi_pool': ('DeformRoIPoolPack', 'ModulatedDeformRoIPoolPack'),
}
OPERATIONS = {name: name for names in _OPERATIONS.values() for name in names}
OPERATIONS |= {
    f'{package}.{name}': name
    for module, names in _OPERATIONS.items()
    for name in names
    for package in ('mmcv.ops', f'mmcv.ops.{module}')
}
# what these do when they are built or run: they evaluate text, read other files, or fetch some
ACTING = {
    'CameraMotionCompensation': 'evaluates text as code',
    'Albu': 'looks names up in a whole package',
    'AppearanceFreeLink': 'reads another checkpoint',
    'KnowledgeDistillationSingleStageDetector': 'reads another config and checkpoint',
    'LAD': 'reads another config and checkpoint',
    'Detectron2Wrapper': 'reads another config and checkpoint',
    'BertModel': 'fetches a model',
    'ATSSVLFusionHead': 'fetches a model',
    'RandomSamplingNegPos': 'fetches a model',
}
# kinds that modules of mmdet tell apart by themselves
OPERATIONS |= {name: name for name in ('conv', 'dilation', 'interpolation_conv', 'last_conv', 'offset')}
# back ends that read files of this machine; others import packages, from folders that they are told, or fetch
_FILE_KEYS, _FILE_BACKENDS = ('backend_args', 'file_client_args'), ('disk', 'local')
# an image of more pixels is none; nor does a detector pad to more than this
_MOST_PIXELS, _MOST_PADDED = 2**28, 2**12
_SIZES = ('scale', 'scales', 'img_scale', 'img_scales', 'size', 'crop_size', 'image_size')
_DIVISORS = ('size_divisor', 'pad_size_divisor')
# no step makes an image this many times larger
_FACTORS, _MOST_LARGER = ('scale_factor', 'ratio_range', 'ratios'), 64


@dataclass
class _Role:
    """Where the types of a part of the config are looked up.

    Attributes:
        name: For messages.
        registries: Of mmdet; what lies above them in mmengine is searched, too.
        others: Other names that stand there.
    """

    name: str
    registries: tuple[Registry, ...]
    others: Mapping[str, str] = field(default_factory=dict)

    def chain(self) -> Iterator[Registry]:
        for registry in self.registries:
            while registry is not None:
                registry.import_from_location()
                yield registry
                registry = registry.parent

    def find(self, name: str) -> tuple[str, str] | None:
        """The registered name of a type, and the name of what it stands for."""
        if name in self.others:
            return self.others[name], self.others[name]
        scope, _, key = name.rpartition('.')
        searched: set[str] = set()
        for registry in self.chain():
            held = registry.module_dict
            if key in held and scope in ('', registry.scope):
                return name, getattr(held[key], '__name__', key)
            # configs in pure Python have classes for types, of which the whole path is stored
            if own := name_by_path(registry, name):
                # some modules compare the plain name
                plain = own if own not in searched else f'{registry.scope}.{own}'
                return plain, getattr(held[own], '__name__', own)
            searched |= held.keys()
        return None

    def known(self) -> set[str]:
        return {*self.others, *(name for registry in self.chain() for name in registry.module_dict)}


def stored_config(stored: Mapping[str, Any], path: str) -> Config:
    """The part of a file's config that loading and inference take, after it was checked.

    That is the model, its data preprocessor and the test pipeline. Nothing in it may be built that mmdet and mmengine
    have not registered for that role. Weights that it would fetch are left out: the file has them all.

    Args:
        stored: The config, plain data.
        path: The file, for messages.

    Raises:
        PTQError: It has no model, needs other code, or holds what no detector does.
    """
    from mmdet.registry import MODELS, TASK_UTILS, TRANSFORMS

    modules = _needed_modules(stored)
    if modules:
        raise PTQError(
            f'the config inside {path!r} needs {", ".join(modules)[:200]}, code that the file would have imported; '
            f'{WAY_OUT}.'
        )
    scope = stored.get('default_scope') or 'mmdet'
    if scope not in SCOPES:
        raise PTQError(f'the config inside {path!r} has the default_scope {scope!r:.60}, another library; {WAY_OUT}.')
    if not isinstance(stored.get('model'), Mapping):
        raise PTQError(f'{path!r} carries no model config; give `config`.')
    models = _Role('models', (MODELS, TASK_UTILS), OPERATIONS)
    kept = dict(default_scope=scope, model=_checked(stored['model'], models, 'model', path))
    if stored.get('data_preprocessor'):
        kept['data_preprocessor'] = _checked(stored['data_preprocessor'], models, 'data_preprocessor', path)
    pipeline = _test_pipeline(stored.get('test_dataloader'))
    if pipeline is not None:
        transforms = _Role('transforms', (TRANSFORMS,))
        kept['test_dataloader'] = dict(dataset=dict(pipeline=_checked(pipeline, transforms, 'test pipeline', path)))
    return Config(kept)


def _needed_modules(stored: Mapping[str, Any]) -> list[str]:
    imports = stored.get('custom_imports') or {}
    imports = imports.get('imports') if isinstance(imports, Mapping) else imports
    names = imports if isinstance(imports, list | tuple) else [imports] if imports else []
    return [
        str(name)
        for name in names
        if not (isinstance(name, str) and name.partition('.')[0] in _LIBRARIES and name in sys.modules)
    ]


def _test_pipeline(value: Any) -> Any:
    """As mmdet finds it: of the data set, or of the one that it wraps."""
    while isinstance(value, Mapping):
        if 'pipeline' in value:
            return value['pipeline']
        parts = value.get('datasets')
        value = value.get('dataset') or (parts[0] if parts and isinstance(parts, list | tuple) else None)
    return None


def _checked(value: Any, role: _Role, where: str, path: str) -> Any:
    """A copy with registered names for types, without weights that would be fetched."""
    if isinstance(value, list | tuple):
        return type(value)(_checked(item, role, f'{where}[{place}]', path) for place, item in enumerate(value))
    if not isinstance(value, Mapping):
        return copy.copy(value)
    found = {}
    for key, inner in value.items():
        place = f'{where}.{key}'
        if key == 'type':
            found[key] = _checked_type(inner, role, where, path)
        elif key in ('init_cfg', 'pretrained'):
            continue
        else:
            _check_value(key, inner, place, path)
            found[key] = _checked(inner, role, place, path)
    return found


def _checked_type(name: Any, role: _Role, where: str, path: str) -> str:
    known = role.find(name) if isinstance(name, str) else None
    if known is None:
        raise PTQError(
            f'the config inside {path!r} asks for {where}.type = {name!r:.100}, which is none of the {role.name} of '
            f'mmdet and mmengine; {WAY_OUT}.{did_you_mean(name, role.known()) if isinstance(name, str) else ""}'
        )
    if known[1] in ACTING:
        raise PTQError(
            f'the config inside {path!r} asks for {where}.type = {name!r:.100}, which {ACTING[known[1]]}; {WAY_OUT}.'
        )
    return known[0]


def _check_value(key: str, value: Any, where: str, path: str) -> None:
    """Refuses values that act or cost where a type is harmless."""
    wrong = ''
    if key == '_scope_' and value not in SCOPES:
        wrong = 'another library'
    elif key in _FILE_KEYS and value and not (isinstance(value, Mapping) and value.get('backend') in _FILE_BACKENDS):
        wrong = 'which reads other than files of this machine'
    elif key in _SIZES and _pixels(value) > _MOST_PIXELS:
        wrong = 'larger than any image'
    elif key in _DIVISORS and isinstance(value, int | float) and value > _MOST_PADDED:
        wrong = 'larger than any image'
    elif key in _FACTORS and _largest(value) > _MOST_LARGER:
        wrong = 'which makes images larger than any'
    if wrong:
        raise PTQError(f'the config inside {path!r} has {where} = {value!r:.100}, {wrong}; {WAY_OUT}.')


def _largest(value: Any) -> float:
    """The largest number among nested lists of them."""
    if isinstance(value, list | tuple):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int | float) else 0


def _pixels(value: Any) -> float:
    """Pixels of the largest size among numbers, pairs of them, and lists of such."""
    if isinstance(value, int | float):
        return abs(value) ** 2 if value == value and abs(value) < 1e9 else 0
    if not isinstance(value, list | tuple) or not value:
        return 0
    if len(value) == 2 and all(isinstance(item, int | float) for item in value):
        return abs(value[0] * value[1])
    return max(map(_pixels, value))
