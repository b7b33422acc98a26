"""The detector of a config, built as mmdet's runner would."""

from __future__ import annotations

import copy

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import nn

from mmdet_ptq.compat import replace_sync_bn


def build_detector(config: Config) -> nn.Module:
    """Builds a config's detector with the weights it is initialised with.

    Args:
        config: An mmdet config; its ``custom_imports`` are imported.
    """
    from mmdet.registry import MODELS

    if config.get('custom_imports'):
        import_modules_from_strings(**config['custom_imports'])
    init_default_scope(config.get('default_scope') or 'mmdet')
    model = copy.deepcopy(config['model'])
    replace_sync_bn(model)
    if config.get('data_preprocessor'):
        model.setdefault('data_preprocessor', config['data_preprocessor'])
    return MODELS.build(model)
