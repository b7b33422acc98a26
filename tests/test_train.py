"""tools/train.py: what it writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from mmcv.ops import roi_align
from torch import nn

PATH = Path(__file__).resolve().parent.parent / 'tools' / 'train.py'


@pytest.fixture(scope='module')
def train():
    spec = importlib.util.spec_from_file_location('train', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('half', [False, True])
def test_the_state_loads_and_holds_what_is_shared_once(train, tmp_path, half):
    shared = nn.Conv2d(8, 8, 3)
    model = nn.ModuleList([shared, nn.BatchNorm2d(8), shared])
    torch.save(train.slim_state(model, half), tmp_path / 'weights.pth')
    state = torch.load(tmp_path / 'weights.pth', weights_only=True)
    assert state['0.weight'].data_ptr() == state['2.weight'].data_ptr() != state['1.weight'].data_ptr()
    assert state['0.weight'].dtype == (torch.float16 if half else torch.float32)
    assert state['1.num_batches_tracked'].dtype == torch.int64
    # by these mmdet's heads tell weights of today from those of early versions
    assert state._metadata['1'] == dict(version=2)
    fresh = nn.ModuleList([nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)])
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh[2].weight, shared.weight, atol=2e-4 if half else 0, rtol=1e-3 if half else 0)


def test_regions_are_read_from_features_in_the_layout_that_mmcv_expects(train):
    one_stage, two_stage = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
    two_stage.roi_head = nn.Identity()
    for model, layout in ((one_stage, torch.channels_last), (two_stage, torch.contiguous_format)):
        train.to_fast_layout(model)
        features = model(torch.randn(1, 4, 16, 16))
        assert features.is_contiguous(memory_format=layout)
    # as mmcv does it: a version that obeys the layout makes the rule above needless
    region = torch.tensor([[0.0, 1.0, 1.0, 9.0, 9.0]])
    read = [roi_align(f, region, (7, 7)) for f in (features, features.to(memory_format=torch.channels_last))]
    assert not torch.allclose(*read)
