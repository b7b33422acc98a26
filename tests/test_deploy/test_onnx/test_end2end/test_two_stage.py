"""One graph of a detector with two stages, against mmdet's own code between its layers."""

from __future__ import annotations

import copy
import runpy

import architectures
import numpy as np
import pytest
import torch
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from torch import nn

from mmdet_ptq.deploy import get_runtime, integer_arithmetic, open_model, runtime_detector, settle_biases, with_runtime
from mmdet_ptq.deploy.network.program import detection_program
from mmdet_ptq.deploy.onnx.end2end import check_end2end
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import SIZE, predict, tiny_batch, tiny_detector, tiny_model_cfg, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.testing.models import MODELS
from mmdet_ptq.wrapping import quantized_weights

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")


def cascade_with_masks() -> dict:
    """A mask head in each of two stages, the first of which moves a box by its class."""
    model, masks = architectures.cascade_rcnn(), architectures.mask_rcnn()['roi_head']
    head = model['roi_head']
    head['bbox_head'][0]['reg_class_agnostic'] = False
    head['bbox_head'][1]['reg_class_agnostic'] = False
    head.update(mask_roi_extractor=masks['mask_roi_extractor'], mask_head=[masks['mask_head']] * 2)
    model['test_cfg']['rcnn']['mask_thr_binary'] = 0.5
    return model


def torchvision_ratio() -> dict:
    """As many samples as a region is large, written as others write it."""
    model = tiny_model_cfg('faster_rcnn')
    model['roi_head']['bbox_roi_extractor']['roi_layer']['sampling_ratio'] = -1
    return model


def double_head() -> dict:
    """A second head reads larger regions; boxes are of no class."""
    model = tiny_model_cfg('faster_rcnn')
    head = model['roi_head']
    head.update(type='DoubleHeadRoIHead', reg_roi_scale_factor=1.3)
    head['bbox_head'].update(
        type='DoubleConvFCBBoxHead', num_convs=1, num_fcs=1, conv_out_channels=16, reg_class_agnostic=True
    )
    return model


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    architectures.register(monkeypatch)
    monkeypatch.setitem(MODELS, 'cascade_with_masks', cascade_with_masks)
    monkeypatch.setitem(MODELS, 'double_head', double_head)
    monkeypatch.setitem(MODELS, 'torchvision_ratio', torchvision_ratio)


def padded_batch() -> dict:
    """Two images, one of which fills its tensor in part."""
    batch = tiny_batch(2, seed=3)
    batch['inputs'][1] = batch['inputs'][1][:, :56, :48]
    batch['data_samples'][1].set_metainfo(dict(img_shape=(56, 48), ori_shape=(112, 96), scale_factor=(0.5, 0.5)))
    return batch


def check(expected: list, found: list, least: float) -> None:
    """So many of the detections are the same, masks too."""
    for ours, theirs in zip(expected, found, strict=True):
        ours, theirs = ours.pred_instances, theirs.pred_instances
        assert len(ours) == len(theirs) > 5 and len(set(ours.labels.tolist())) > 1
        near = (theirs.bboxes[:, None] - ours.bboxes).abs().amax(-1) <= 0.05
        near &= (theirs.scores[:, None] - ours.scores).abs() <= 1e-3
        near &= theirs.labels[:, None] == ours.labels
        assert near.any(0).float().mean() >= least and near.any(1).float().mean() >= least
        if 'masks' in ours:
            mine, others = near.any(0), near.int().argmax(0)
            assert ours.masks[mine].any()
            assert (ours.masks[mine] == theirs.masks[others[mine]]).float().mean() > 0.999


@pytest.mark.parametrize(
    ('kind', 'runtime', 'dynamic'),
    [
        pytest.param('mask_rcnn', 'onnxruntime', True, marks=pytest.mark.thorough),
        pytest.param('mask_rcnn', 'openvino', False, marks=pytest.mark.thorough),
        pytest.param('faster_rcnn', 'openvino', True, marks=pytest.mark.thorough),
        pytest.param('cascade_with_masks', 'onnxruntime', False, marks=pytest.mark.thorough),
        pytest.param('double_head', 'onnxruntime', False, marks=pytest.mark.thorough),
        pytest.param('torchvision_ratio', 'openvino', False, marks=pytest.mark.thorough),
    ],
)
def test_it_detects_what_mmdet_detects(kind, runtime, dynamic, tmp_path):
    pytest.importorskip(runtime)
    detector = tiny_detector(kind)
    shape = (1 if dynamic else 2, 3, SIZE, SIZE)
    path = get_runtime(runtime).export(detector, tmp_path, shape, end2end=True, dynamic_batch=dynamic)
    # one file, whatever reads it
    assert {file.stem for file in tmp_path.iterdir()} == {'model'}
    around, batch = with_runtime(tiny_detector(kind, seed=5), open_model(path, threads=1)), padded_batch()
    # of regions that score alike, either may come first and suppress the other
    check(predict(detector, batch), predict(around, batch), 0.9 if kind == 'double_head' else 1.0)


def test_it_computes_in_integers_what_was_simulated(tmp_path):
    detector, structure = tiny_quantized('faster_rcnn', dict(OBSERVE, dataflow='balanced'))
    settle_biases(detector, structure)
    path = get_runtime('onnxruntime').export(detector, tmp_path, (2, 3, SIZE, SIZE), end2end=True)
    model, batch = open_model(path, threads=1), padded_batch()
    coverage = model.coverage()
    assert {name.partition('#')[0] for name in coverage.integer} == set(quantized_weights(detector))
    with integer_arithmetic(detector):
        expected = predict(detector, batch)
    # where regions are read is float: a code on a boundary may fall to either side
    check(expected, predict(with_runtime(tiny_detector('faster_rcnn', seed=5), model), batch), 0.8)


@pytest.mark.thorough
def test_nothing_proposed_is_nothing_detected(tmp_path):
    detector = tiny_detector('mask_rcnn')
    detector.rpn_head.test_cfg['min_bbox_size'] = 1000
    path = get_runtime('onnxruntime').export(detector, tmp_path, (1, 3, SIZE, SIZE), end2end=True)
    image = np.zeros((1, 3, SIZE, SIZE), np.float32)
    boxes, scores, labels, masks = open_model(path, threads=1)(image, np.float32([[SIZE, SIZE]]))
    assert not boxes.any() and not scores.any() and (labels == -1).all() and not masks.any()


@pytest.mark.thorough
def test_the_program_draws_the_masks_that_mmdet_draws(tmp_path):
    detector, runtime = tiny_detector('mask_rcnn'), get_runtime('onnxruntime')
    shape = (1, 3, SIZE, SIZE)
    path = runtime.export(detector, tmp_path, shape, end2end=True)
    batch = tiny_batch(1, seed=3)
    # the program reads BGR, and makes it what the detector was given
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(SIZE, SIZE), keep_ratio=True)]
    (tmp_path / 'detect.py').write_text(
        detection_program(pipeline, detector, shape, runtime.opening, path.name, ['a', 'b', 'c'])
    )
    program = runpy.run_path(str(tmp_path / 'detect.py'))
    image = np.ascontiguousarray(batch['inputs'][0].permute(1, 2, 0).numpy())
    boxes, scores, labels, masks = program['detect'](program['load'](path), image, 0.0)
    (expected,) = predict(detector, batch)
    # what has no area is not told
    expected = expected.pred_instances
    expected = expected[(expected.bboxes[:, 2:] > expected.bboxes[:, :2]).all(1)]
    assert len(boxes) == len(expected) > 5 and masks[0].shape == (SIZE, SIZE)
    overlaps = bbox_overlaps(torch.from_numpy(boxes), expected.bboxes, is_aligned=True)
    assert overlaps.min() > 0.99 and (labels == expected.labels.numpy()).all()
    assert expected.masks.any() and (np.stack(masks) == expected.masks.numpy()).mean() > 0.999


def soft(detector: nn.Module) -> None:
    detector.roi_head.test_cfg['nms'] = dict(type='soft_nms', iou_threshold=0.5)


def unlimited(detector: nn.Module) -> None:
    del detector.rpn_head.test_cfg['max_per_img']


def everything(detector: nn.Module) -> None:
    detector.roi_head.test_cfg['max_per_img'] = -1


def uncertain(detector: nn.Module) -> None:
    detector.roi_head.test_cfg['mask_thr_binary'] = -1


def proposing(detector: nn.Module) -> None:
    detector.rpn_head.__class__ = type('MyRPN', (type(detector.rpn_head),), dict(_bbox_post_process=None))


def moving(detector: nn.Module) -> None:
    head = detector.roi_head.bbox_head
    head.__class__ = type('MyHead', (type(head),), dict(_predict_by_feat_single=None))


def largest(detector: nn.Module) -> None:
    detector.roi_head.bbox_roi_extractor.roi_layers[0].pool_mode = 'max'


@pytest.mark.parametrize(
    ('kind', 'change', 'told'),
    [
        ('faster_rcnn', soft, r'StandardRoIHead has `model.test_cfg.rcnn.nms=.*soft_nms'),
        ('faster_rcnn', unlimited, r'`model.test_cfg.rpn` of RPNHead needs `max_per_img` and `nms`'),
        ('faster_rcnn', everything, r'`model.test_cfg.rcnn.max_per_img` of StandardRoIHead must be a number .* is -1'),
        ('mask_rcnn', uncertain, '.*mask_thr_binary` below zero'),
        ('faster_rcnn', proposing, 'MyRPN proposes in a way of its own'),
        ('faster_rcnn', moving, r'MyHead predicts in a way of its own \(_predict_by_feat_single\)'),
        ('faster_rcnn', largest, 'SingleRoIExtractor reads regions in a way of its own'),
        ('groie', lambda detector: None, 'GenericRoIExtractor reads regions in a way of its own'),
        ('point_rend', lambda detector: None, r'PointRendRoIHead predicts in a way of its own \(predict_mask\)'),
        ('query_inst', lambda detector: None, 'QueryInst predicts in a way of its own'),
    ],
)
def test_what_the_graph_cannot_repeat_is_refused_by_name(kind, change, told):
    detector = copy.deepcopy(tiny_detector(kind))
    change(detector)
    with pytest.raises(PTQError, match=f'--end2end: {told}.*; export without --end2end'):
        check_end2end(detector)


@pytest.mark.thorough
def test_it_is_built_from_a_config_as_other_models_are(tmp_path):
    config = Config(dict(model=tiny_model_cfg('faster_rcnn'), default_scope='mmdet'))
    path = get_runtime('onnxruntime').export(tiny_detector('faster_rcnn'), tmp_path, (1, 3, SIZE, SIZE), end2end=True)
    batch = tiny_batch(1, seed=3)
    check(predict(tiny_detector('faster_rcnn'), batch), predict(runtime_detector(config, open_model(path)), batch), 1.0)
    config.model.roi_head.bbox_head.num_classes = 5
    with pytest.raises(PTQError, match=r"number 10 has the shape \[4\], the config's 11 have \[6\] there"):
        runtime_detector(config, open_model(path))
