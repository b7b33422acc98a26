"""Each workaround: the fault is there without it, and gone with it."""

from __future__ import annotations

import pickle
import pkgutil
import sys
import threading

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.config import config as config_module
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.utils import ManagerMixin, digit_version
from torch import nn
from yapf.yapflib import yapf_api

from mmdet_ptq import compat
from mmdet_ptq.errors import PTQError


def test_workarounds_are_applied_once_per_process():
    compat.apply_workarounds()
    assert compat.apply_workarounds() == []
    assert not any(workaround.applies() for workaround in compat.WORKAROUNDS)


def test_package_that_fails_to_import_is_announced(monkeypatch):
    def broken() -> bool:
        raise ImportError('no module of that name')

    told = []
    monkeypatch.setattr(compat, 'print_log', lambda message, **kwargs: told.append((message, kwargs['level'])))
    monkeypatch.setattr(compat, 'WORKAROUNDS', (compat.Workaround('some fault', 'all', 'it fails', broken, broken),))
    assert compat.apply_workarounds() == []
    assert len(told) == 1 and 'some fault' in told[0][0] and told[0][1] >= 30


# ---- the lock of mmengine's global instances ----


class Unbuildable(ManagerMixin):
    def __init__(self, name):
        raise ValueError('no such back end')


def _wait_for_an_instance(timeout: float = 10) -> bool:
    thread = threading.Thread(target=lambda: MMLogger.get_instance('another thread'), daemon=True)
    thread.start()
    thread.join(timeout)
    return not thread.is_alive()


@pytest.mark.parametrize(
    'error, ask',
    [(ValueError, lambda: Unbuildable.get_instance('x')), (RuntimeError, Unbuildable.get_current_instance)],
)
def test_what_cannot_be_built_keeps_no_other_thread_waiting(error, ask):
    compat.apply_workarounds()
    with pytest.raises(error):
        ask()
    assert _wait_for_an_instance()


# ---- SSDHead ----


def _ssd_head(cls=None):
    from mmdet.models import SSDHead

    return (cls or SSDHead)(
        num_classes=2,
        in_channels=(4,),
        anchor_generator=dict(
            type='SSDAnchorGenerator', scale_major=False, strides=[8], ratios=[[2]], min_sizes=[8], max_sizes=[16]
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4),
        test_cfg=Config(
            dict(nms_pre=10, nms=dict(type='nms', iou_threshold=0.5), min_bbox_size=0, score_thr=0.0, max_per_img=5)
        ),
    )


def _predict(head) -> int:
    scores, boxes = head((torch.randn(1, 4, 4, 4),))
    meta = dict(img_shape=(32, 32), scale_factor=(1.0, 1.0))
    return len(head.predict_by_feat(scores, boxes, batch_img_metas=[meta])[0].bboxes)


def test_ssd_head_predicts():
    compat.apply_workarounds()
    head = _ssd_head()
    assert _predict(head) == 5
    del head.loss_cls  # as mmdet left it
    with pytest.raises(AttributeError, match='loss_cls'):
        _predict(head)


def test_ssd_head_subclass_keeps_its_own_loss():
    compat.apply_workarounds()
    from mmdet.models import SSDHead

    class WithLoss(SSDHead):
        def __init__(self, **kwargs) -> None:
            super().__init__(**kwargs)
            self.loss_cls = nn.CrossEntropyLoss()

    head = _ssd_head(WithLoss)
    assert isinstance(head.loss_cls, nn.CrossEntropyLoss)
    assert 'loss_cls' in dict(head.named_children())


# ---- checkpoints of mmengine ----


class _Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, *inputs, mode: str = 'loss') -> dict:
        loss = self.linear(torch.stack(inputs)).square().mean()
        return dict(loss=loss, loss_other=2 * loss)


def _train(work_dir, epochs: int, resume: bool) -> Runner:
    runner = Runner(
        _Model(),
        work_dir=str(work_dir),
        experiment_name=f'{work_dir.parent.name}-{epochs}-{resume}',
        resume=resume,
        train_dataloader=dict(
            dataset=list(torch.ones(4, 2)),
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        param_scheduler=dict(type='StepLR', step_size=1),
        default_scope='mmdet',
        log_level='ERROR',
    )
    runner.message_hub.update_scalar('val/ap', np.float32(0.5))
    runner.message_hub.update_info('best', np.float64(0.25))
    runner.train()
    return runner


def test_mmengine_checkpoint_loads_and_resumes(tmp_path):
    compat.apply_workarounds()
    _train(tmp_path / 'work', 1, resume=False)

    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    # the maintained fork of mmengine (0.10.12) loads its own checkpoints; there is no fault to show
    fault = digit_version(mmengine.__version__) < digit_version('0.10.12')
    try:
        if fault:
            with pytest.raises(pickle.UnpicklingError, match='Weights only load failed'):
                _train(tmp_path / 'work', 2, resume=True)
    finally:
        torch.serialization.add_safe_globals(allowed)

    resumed = _train(tmp_path / 'work', 2, resume=True)
    assert resumed.iter == 4
    losses, counts = resumed.message_hub.get_scalar('train/loss').data
    assert len(losses) == len(counts) == 4 and losses.dtype == np.float64
    assert resumed.message_hub.get_info('best') == 0.25
    assert resumed.message_hub.get_scalar('train/loss').statistics('mean') == pytest.approx(losses.mean())


class _Evil:
    def __reduce__(self):
        return getattr, ('any object', 'upper')


def test_getattr_stays_refused(tmp_path):
    compat.apply_workarounds()
    torch.save(dict(evil=_Evil()), tmp_path / 'evil.pth')
    with pytest.raises(Exception, match='refused to look up'):
        torch.load(tmp_path / 'evil.pth')


def test_history_attributes_beyond_statistics_stay_refused():
    assert compat.history_statistic(HistoryBuffer, 'mean') is HistoryBuffer.mean
    with pytest.raises(Exception, match='refused to look up'):
        compat.history_statistic(HistoryBuffer, '__init__')


# ---- synchronized batch norm ----


def test_sync_bn_becomes_bn():
    cfg = Config(
        dict(
            model=dict(
                backbone=dict(norm_cfg=dict(type='SyncBN', requires_grad=True)),
                necks=[dict(norm_cfg=dict(type='MMSyncBN')), dict(norm_cfg=dict(type='GN', num_groups=2))],
                head=dict(norm_cfg=dict(type=nn.SyncBatchNorm), act_cfg=dict(type='ReLU')),
            )
        )
    ).model
    assert compat.replace_sync_bn(cfg) == 3
    assert cfg.backbone.norm_cfg == dict(type='BN', requires_grad=True)
    assert cfg.necks[0].norm_cfg.type == 'BN' and cfg.necks[1].norm_cfg.type == 'GN'
    assert cfg.head.norm_cfg.type == 'BN' and cfg.head.act_cfg.type == 'ReLU'
    assert compat.replace_sync_bn(cfg) == 0


def test_sync_bn_stays_in_a_process_group(monkeypatch):
    monkeypatch.setattr(compat, 'is_distributed', lambda: True)
    cfg = dict(norm_cfg=dict(type='SyncBN'))
    assert compat.replace_sync_bn(cfg) == 0 and cfg['norm_cfg']['type'] == 'SyncBN'


def test_sync_bn_fault_is_there_without_the_rewrite():
    import mmcv.ops  # noqa: F401, registers MMSyncBN
    from mmcv.cnn import ConvModule

    cfg = dict(norm_cfg=dict(type='MMSyncBN'))
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises((RuntimeError, ValueError)):
        ConvModule(3, 4, 1, **cfg).train()(x)
    compat.replace_sync_bn(cfg)
    assert ConvModule(3, 4, 1, **cfg).train()(x).shape == (2, 4, 4, 4)


# ---- pkg_resources ----


def test_missing_pkg_resources_is_told(monkeypatch):
    monkeypatch.setattr(compat, 'find_spec', lambda name: None)
    with pytest.raises(PTQError, match=r'setuptools<82'):
        compat.check_pkg_resources()


def test_present_pkg_resources_passes(monkeypatch):
    monkeypatch.setattr(compat, 'find_spec', lambda name: object())
    compat.check_pkg_resources()


# ---- Python 3.14 ----


def test_mmcv_finds_its_operators_without_find_loader(monkeypatch):
    from mmcv.utils.ext_loader import check_ops_exist

    monkeypatch.delattr(pkgutil, 'find_loader', raising=False)
    assert 'pkgutil.find_loader' in compat.apply_workarounds() and check_ops_exist()
    assert pkgutil.find_loader('no_such_module') is None
    monkeypatch.delattr(pkgutil, 'find_loader')


# ---- lvis ----


@pytest.mark.skipif(not hasattr(config_module, 'FormatCode'), reason='the onedl stack formats in another way')
def test_a_config_is_formatted_once(monkeypatch):
    calls = []

    def format_code(text, style_config):
        calls.append(text)
        return yapf_api.FormatCode(text, style_config=style_config)

    monkeypatch.setattr(config_module, 'FormatCode', format_code)
    assert 'formatting of configs' in compat.apply_workarounds()
    assert 'formatting of configs' not in compat.apply_workarounds()
    cfg = Config(dict(model=dict(type='RetinaNet', widths=[1, 2]), seed=0))
    first = cfg.pretty_text
    assert cfg.pretty_text == first and Config.fromstring(first, '.py').to_dict() == cfg.to_dict() and len(calls) == 1
    cfg.seed = 1
    assert cfg.pretty_text == first.replace('seed = 0', 'seed = 1') and len(calls) == 2


def test_lvis_accumulates_with_the_present_numpy(monkeypatch, tmp_path):
    # as in lvis 0.5.3, eval.py
    (tmp_path / 'lvis').mkdir()
    (tmp_path / 'lvis' / '__init__.py').touch()
    (tmp_path / 'lvis' / 'eval.py').write_text(
        'import numpy as np\n\n\nclass LVISEval:\n    def accumulate(self, tps):\n'
        '        return np.cumsum(tps).astype(dtype=np.float)\n'
    )
    for name in [name for name in sys.modules if name.partition('.')[0] == 'lvis']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    from lvis.eval import LVISEval

    with pytest.raises(AttributeError, match='float'):
        LVISEval().accumulate([True, True])
    assert 'np.float in lvis' in compat.apply_workarounds()
    assert LVISEval().accumulate([True, True]).tolist() == [1.0, 2.0]
    assert not hasattr(np, 'float') and compat.apply_workarounds() == []
    for name in ('lvis', 'lvis.eval'):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize('limits', [(0, 4.0), (0.0, 4)])
def test_ranges_of_two_types_are_exported(limits):
    pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    onnx = pytest.importorskip('onnx')

    class Range(torch.nn.Module):
        def forward(self, x):
            return x + torch.arange(*limits)

    def exported():
        program = torch.onnx.export(Range().eval(), (torch.zeros(4),), dynamo=True, optimize=False, verbose=False)
        onnx.checker.check_model(program.model_proto, full_check=True)

    with pytest.raises(onnx.shape_inference.InferenceError, match='inconsistent type'):
        exported()
    with compat.typed_ranges():
        assert torch.arange(*limits).dtype == torch.float32 and torch.arange(3).dtype == torch.int64
        exported()
