"""What a stored config may say: everything that stock detectors of mmdet do, and no more than inference takes."""

from __future__ import annotations

from pathlib import Path

import mmdet
import pytest
from mmengine.config import Config

from mmdet_ptq import PTQError
from mmdet_ptq.deploy.network.stored_config import stored_config

STOCK = Path(mmdet.__file__).parent / '.mim' / 'configs'
# of each way to name things: RoI layers, transformers, kinds of their own, nested heads
NAMES = (
    'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py',
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'fpg/faster-rcnn_r50_fpg_crop640-50e_coco.py',
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.01-coco.py',
    'yolox/yolox_s_8xb8-300e_coco.py',
)


@pytest.mark.parametrize('name', NAMES)
def test_stock_detectors_are_accepted_as_they_are(name):
    if not (STOCK / name).is_file():
        pytest.skip('this mmdet brings no such config')
    given = Config.fromfile(STOCK / name).to_dict()
    kept = stored_config(given, 'f').to_dict()
    assert kept.keys() <= {'default_scope', 'model', 'data_preprocessor', 'test_dataloader'}
    assert kept['model']['type'] == given['model']['type']
    assert kept['test_dataloader']['dataset']['pipeline'] == given['test_dataloader']['dataset']['pipeline']
    assert 'init_cfg' not in str(kept)


def test_classes_of_pure_python_configs_become_their_names():
    model = dict(
        type='mmdet.models.RetinaNet',
        neck=dict(type='mmdet.models.necks.fpn.FPN', norm_cfg=dict(type='torch.nn.BatchNorm2d')),
        test_cfg=dict(nms=dict(type='mmcv.ops.nms')),
    )
    found = stored_config(dict(model=model), 'f').model
    assert (found.type, found.neck.type, found.neck.norm_cfg.type) == ('RetinaNet', 'FPN', 'BN')
    assert found.test_cfg.nms.type == 'nms'


@pytest.mark.parametrize('path', ['mmdet.models.sys', 'mmdet.models.necks.fpn.nn', 'torch.nn.Module', 'mmcv.ops.os'])
def test_what_a_library_happens_to_import_is_no_part_of_a_detector(path):
    with pytest.raises(PTQError, match='none of the models'):
        stored_config(dict(model=dict(type=path)), 'f')


def test_what_is_meant_is_suggested():
    with pytest.raises(PTQError, match="Did you mean 'RetinaNet'"):
        stored_config(dict(model=dict(type='RetinaNett')), 'f')


def test_our_own_modules_need_no_trust():
    model = dict(type='RetinaNet')
    assert stored_config(dict(model=model, custom_imports=dict(imports=['mmdet_ptq'])), 'f').model.type == 'RetinaNet'
