"""Registries of mmdet-ptq: children of mmengine's roots, scope ``mmdet_ptq``.

``locations`` makes every scoped name (``type='mmdet_ptq.X'``) resolve without ``custom_imports``.
"""

from __future__ import annotations

import sys
from typing import Any

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import Registry

SCOPE = 'mmdet_ptq'

# number formats: tensor in, integer codes and tensor out
QUANTIZERS = Registry('quantizer', scope=SCOPE, locations=['mmdet_ptq.quantizers'])
# statistics of a tensor that become a quantization range
OBSERVERS = Registry('observer', scope=SCOPE, locations=['mmdet_ptq.quantizers'])
# inference runtimes that execute an exported detector
RUNTIMES = Registry(
    'runtime',
    scope=SCOPE,
    locations=[
        'mmdet_ptq.deploy.ncnn.runtime',
        'mmdet_ptq.deploy.onnxruntime.runtime',
        'mmdet_ptq.deploy.openvino.runtime',
        'mmdet_ptq.deploy.tensorrt.runtime',
    ],
)

RUNNERS = Registry('runner', parent=MMENGINE_RUNNERS, scope=SCOPE, locations=['mmdet_ptq.engine'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope=SCOPE, locations=['mmdet_ptq.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope=SCOPE, locations=['mmdet_ptq.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor', parent=MMENGINE_CONSTRUCTORS, scope=SCOPE, locations=['mmdet_ptq.engine']
)
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope=SCOPE, locations=['mmdet_ptq.datasets'])


def registered(registry: Registry, name: str) -> Any:
    """What one of our registries holds under exactly this name; None if it holds nothing.

    ``registry.get`` and ``registry.build`` import a name that they do not know, and hand on whatever they find there.

    Args:
        registry: The registry; no other is searched.
        name: The name, with or without the scope ``mmdet_ptq.``; or the class's whole path, as mmengine's configs in
            pure Python give it.
    """
    registry.import_from_location()
    key: str | None = name.removeprefix(f'{SCOPE}.')
    if key not in registry.module_dict:
        key = name_by_path(registry, name)
    return registry.module_dict.get(key)


def name_by_path(registry: Registry, path: str) -> str | None:
    """The name under which a registry holds what stands at ``package.module.Class``; None if it does not hold it.

    Nothing is imported: what a registry holds, and the modules that hand it on, are imported already.
    """
    package, _, name = path.rpartition('.')
    found = vars(sys.modules[package]).get(name) if package in sys.modules else None
    for key, kind in registry.module_dict.items():
        if kind is found or f'{kind.__module__}.{getattr(kind, "__qualname__", key)}' == path:
            return key
    return None


def runtime_names() -> list[str]:
    """Names of all runtimes, as they stand in ``ptq.export``."""
    RUNTIMES.import_from_location()
    return sorted(RUNTIMES.module_dict)
