import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope

from mmdet_ptq.analysis import bops, float_bops, float_size_bytes, new_results, result_row
from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.wrapping import LayerStructure, Structure, prepare_detector
from mmdet_ptq.wrapping.structure import ActivationStructure

PREPROCESSOR = dict(type='DetDataPreprocessor', mean=[128.0] * 3, std=[64.0] * 3, bgr_to_rgb=True, pad_size_divisor=32)
BACKBONE = dict(
    type='ResNet',
    depth=18,
    base_channels=8,
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(0, 1),
    norm_eval=True,
    style='pytorch',
)
NECK = dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2)
ANCHORS = dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8])
CODER = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
SIGMOID = dict(type='CrossEntropyLoss', use_sigmoid=True)
NMS = dict(type='nms', iou_threshold=0.5)


def retinanet():
    return dict(
        type='RetinaNet',
        data_preprocessor=PREPROCESSOR,
        backbone=BACKBONE,
        neck=NECK,
        bbox_head=dict(
            type='RetinaHead',
            num_classes=3,
            in_channels=8,
            feat_channels=8,
            stacked_convs=1,
            anchor_generator=ANCHORS,
            bbox_coder=CODER,
            loss_cls=SIGMOID,
        ),
        test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.05, nms=NMS, max_per_img=5),
    )


def faster_rcnn():
    return dict(
        type='FasterRCNN',
        data_preprocessor=PREPROCESSOR,
        backbone=BACKBONE,
        neck=NECK,
        rpn_head=dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=ANCHORS, bbox_coder=CODER),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=3),
                out_channels=8,
                featmap_strides=[4, 8],
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=8,
                fc_out_channels=16,
                roi_feat_size=3,
                num_classes=3,
                bbox_coder=CODER,
            ),
        ),
        train_cfg=None,
        test_cfg=dict(
            rpn=dict(nms_pre=50, max_per_img=20, nms=NMS, min_bbox_size=0),
            rcnn=dict(score_thr=0.05, nms=NMS, max_per_img=5),
        ),
    )


def make_batch(seed, images=2):
    """What a dataloader of the test pipeline yields: (3, 60, 90) images, shrunk to half their size."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randint(0, 256, (3, 60, 90), generator=generator, dtype=torch.uint8) for _ in range(images)]
    samples = [
        DetDataSample(metainfo=dict(img_id=i, ori_shape=(120, 180), img_shape=(60, 90), scale_factor=(0.5, 0.5)))
        for i in range(images)
    ]
    return dict(inputs=inputs, data_samples=samples)


def quantized(model_cfg, **ptq):
    """A tiny detector with random weights, quantized, next to its float original."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    detector = MODELS.build(ConfigDict(model_cfg)).eval()
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    detector.dataset_meta = dict(classes=('cat', 'dog', 'bird'))
    original = copy.deepcopy(detector)
    one = make_batch(0, images=1)
    recipe = PTQConfig.from_dict(dict(preset='w8a8_observe', **ptq))
    structure = prepare_detector(
        detector, recipe, lambda: detector(**detector.data_preprocessor(one, False), mode='predict')
    )
    observe_activations(detector, [make_batch(1), make_batch(2)], structure)
    return SimpleNamespace(detector=detector, original=original, structure=structure, recipe=recipe)


@pytest.fixture(scope='session')
def batch():
    return make_batch


@pytest.fixture(scope='session')
def tiny():
    return quantized(retinanet())


@pytest.fixture(scope='session')
def tiny_two_stage():
    return quantized(faster_rcnn())


@pytest.fixture
def quantized_with():
    return lambda **ptq: quantized(retinanet(), **ptq)


@pytest.fixture
def structure():
    """Three layers and one operation, with costs that are easy to work out by hand."""
    spec = dict(type='mmdet_ptq.AffineQuantizer', num_channels=None)
    return Structure(
        layers=[
            LayerStructure(
                'backbone.conv',
                'convolution',
                'backbone',
                macs=1000,
                numel=100,
                weight=dict(spec, bits=4),
                inputs=['a8'],
            ),
            LayerStructure(
                'head.shared',
                'convolution',
                'head',
                macs=500,
                numel=20,
                weight=dict(spec, bits=8),
                inputs=['a8', 'a16'],
            ),
            LayerStructure('head.out', 'linear', 'head', macs=10, numel=30, reason='left float'),
        ],
        activations=dict(
            a8=ActivationStructure(dict(spec, bits=8), 2), a16=ActivationStructure(dict(spec, bits=16), 1)
        ),
        uncovered=[dict(module='head.attention', operation='matmul', reason='activation x activation', macs=90)],
    )


@pytest.fixture(scope='session')
def whole_results(tiny):
    results = new_results('configs/tiny.py', tiny.recipe.to_dict(), 7, tiny.structure, [3, 5, 8], ['broken.jpg'])
    results['stages'] = {'prepare': {'seconds': 1.25}, 'observe': {'seconds': 2.5}}
    size = float_size_bytes(tiny.original)
    before = {'coco/bbox_mAP': 0.412, 'coco/bbox_mAP_50': 0.6, 'coco/bbox_mAP_s': -1.0}
    after = {'coco/bbox_mAP': np.float64(0.4), 'coco/bbox_mAP_50': 0.61, 'coco/bbox_mAP_s': -1.0}
    results['rows'] = [
        result_row('float', before, size, float_bops(tiny.structure)),
        result_row('simulated', after, size // 4, bops(tiny.structure)),
        result_row('onnxruntime', after, size // 4, bops(tiny.structure), latency_ratio=1.8),
    ]
    return results


@pytest.fixture
def results(whole_results):
    return copy.deepcopy(whole_results)
