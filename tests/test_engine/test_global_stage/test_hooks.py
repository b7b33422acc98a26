"""The hook supplies targets, looks at the held-out images before training, and finds files that were moved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import get_priority
from torch import nn

from mmdet_ptq.calibration import FilteredGlobalLoss
from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.engine.global_stage.hooks import FilteredGlobalLossHook
from mmdet_ptq.engine.global_stage.train import GlobalLossModel
from mmdet_ptq.predictions import predict_aligned
from mmdet_ptq.registry import HOOKS
from mmdet_ptq.testing import tiny_batch, tiny_detector


class Loop:
    """A validation loop that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self) -> None:
        self.runs += 1


def test_it_is_known_by_name_and_comes_after_the_checkpoints():
    detector = nn.Conv2d(1, 1, 1).train()
    hook = HOOKS.build(dict(type='mmdet_ptq.FilteredGlobalLossHook', detector=detector))
    assert isinstance(hook, FilteredGlobalLossHook) and hook.detector is detector and not detector.training
    assert get_priority(hook.priority) > get_priority(CheckpointHook.priority)


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('when', ['before_train_iter', 'before_val_iter'])
def test_the_target_is_what_the_float_detector_predicts(when, wrapped):
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    MODEL_WRAPPERS.register_module(name='HooksTestWrapper', module=Wrapper, force=True)
    float_detector, other = tiny_detector('retinanet'), tiny_detector('retinanet', seed=1)
    model = GlobalLossModel(other, FilteredGlobalLoss(GlobalLossConfig()))
    runner = SimpleNamespace(model=Wrapper(model) if wrapped else model)
    hook, batch = FilteredGlobalLossHook(float_detector), tiny_batch(2, seed=3)
    getattr(hook, when)(runner, 0, batch)
    data = float_detector.data_preprocessor(tiny_batch(2, seed=3), False)
    with torch.no_grad():
        expected = predict_aligned(float_detector, data['inputs'], data['data_samples'])
    assert torch.equal(model.target.cls_logits, expected.cls_logits) and torch.equal(model.target.boxes, expected.boxes)
    assert not model.target.boxes.requires_grad
    # of the next batch another
    getattr(hook, when)(runner, 1, tiny_batch(1, seed=4))
    assert len(model.target.boxes) == 1


@pytest.mark.parametrize(
    'at, interval, most, runs',
    [(0, 50, 100, 1), (50, 50, 100, 1), (49, 50, 100, 0), (100, 50, 100, 1), (70, 50, 70, 1), (3, 1, 9, 1)],
)
def test_the_held_out_loss_is_measured_before_training_where_it_may_be_missing(at, interval, most, runs):
    loop = Loop()
    train = SimpleNamespace(iter=at, val_interval=interval, max_iters=most)
    hook = FilteredGlobalLossHook(nn.Identity())
    hook.before_train(SimpleNamespace(train_loop=train, val_loop=loop))
    assert loop.runs == runs
    hook.before_train(SimpleNamespace(train_loop=train, val_loop=None))


def test_files_of_a_moved_folder_are_found_in_the_present_one():
    info = dict(best_ckpt='/gone/before/best_global_loss_iter_4.pth', last_ckpt='before/iter_6.pth', iter=6)
    checkpoint = dict(message_hub=dict(runtime_info=info), meta='kept')
    FilteredGlobalLossHook(nn.Identity()).after_load_checkpoint(SimpleNamespace(work_dir='/now/global'), checkpoint)
    assert checkpoint['message_hub']['runtime_info'] == dict(
        best_ckpt=str(Path('/now/global/best_global_loss_iter_4.pth')),
        last_ckpt=str(Path('/now/global/iter_6.pth')),
        iter=6,
    )
    assert checkpoint['meta'] == 'kept'


@pytest.mark.parametrize(
    'checkpoint',
    [
        {},
        dict(message_hub={}),
        dict(message_hub=dict(runtime_info={})),
        dict(message_hub=dict(runtime_info=dict(best_ckpt=None, last_ckpt=''))),
    ],
)
def test_checkpoints_that_name_no_file_stay_as_they_are(checkpoint):
    before = repr(checkpoint)
    FilteredGlobalLossHook(nn.Identity()).after_load_checkpoint(SimpleNamespace(work_dir='/now'), checkpoint)
    assert repr(checkpoint) == before
