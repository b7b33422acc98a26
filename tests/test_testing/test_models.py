"""The configs of the tiny detectors: of mmdet's own parts, small, and each a config of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope

from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing.models import MODELS, NUM_CLASSES, SIZE, tiny_model_cfg


def dicts(value: object) -> Iterator[dict]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from dicts(item)


@pytest.mark.parametrize('kind', MODELS)
def test_a_config_that_is_changed_leaves_the_next_one_as_it_was(kind):
    before = {other: json.dumps(tiny_model_cfg(other)) for other in MODELS}
    for part in list(dicts(tiny_model_cfg(kind))):
        part.clear()
    for part in list(dicts(tiny_model_cfg(kind))):
        for value in part.values():
            if isinstance(value, list):
                value.append('changed')
    assert {other: json.dumps(tiny_model_cfg(other)) for other in MODELS} == before


@pytest.mark.parametrize('kind', MODELS)
def test_detectors_are_small_and_made_of_stock_modules(kind):
    init_default_scope('mmdet')
    detector = MMDET_MODELS.build(ConfigDict(tiny_model_cfg(kind)))
    homes = {type(module).__module__.partition('.')[0] for module in detector.modules()}
    assert homes <= {'mmdet', 'mmcv', 'mmengine', 'torch'}
    assert 1000 < sum(parameter.numel() for parameter in detector.parameters()) < 300_000
    heads = [module for module in detector.modules() if hasattr(module, 'num_classes')]
    # a region proposal network tells objects from the rest
    assert {head.num_classes for head in heads} <= {1, NUM_CLASSES} and NUM_CLASSES in {h.num_classes for h in heads}


@pytest.mark.parametrize('kind', MODELS)
def test_images_need_no_padding(kind):
    divisor = tiny_model_cfg(kind)['data_preprocessor']['pad_size_divisor']
    assert SIZE % divisor == 0


@pytest.mark.parametrize(
    'kind, told',
    [
        ('retinanett', "there is no tiny detector 'retinanett'. Did you mean 'retinanet'? Known: ssd, "),
        ('', "there is no tiny detector ''. Known: ssd, "),
        (None, 'there is no tiny detector None. '),
        ('SSD', "there is no tiny detector 'SSD'. Known: ssd, retinanet, yolox, rtmdet, faster_rcnn."),
    ],
)
def test_an_unknown_kind_is_told_with_those_there_are(kind, told):
    with pytest.raises(PTQError, match=f'^{re.escape(told)}'):
        tiny_model_cfg(kind)
