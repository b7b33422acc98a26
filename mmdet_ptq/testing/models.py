"""Model configs of the tiny detectors: stock mmdet modules, a few hundred thousand weights at most, 64 x 64 images."""

from __future__ import annotations

import copy

from mmdet_ptq.errors import PTQError, did_you_mean

SIZE = 64
NUM_CLASSES = 3

_NORM = dict(type='BN', momentum=0.03, eps=0.001)
_PREPROCESSOR = dict(
    type='DetDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_size_divisor=32,
)
_TEST = dict(nms_pre=200, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=20)
_DELTA = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
_RESNET = dict(
    type='ResNet',
    depth=18,
    base_channels=8,
    num_stages=3,
    strides=(1, 2, 2),
    dilations=(1, 1, 1),
    out_indices=(1, 2),
    norm_cfg=dict(type='BN'),
    norm_eval=True,
    style='pytorch',
)
# channels before and after, blocks, residual additions, spatial pyramid pooling
_TWO_STAGES = [[64, 128, 3, True, False], [128, 256, 3, False, True]]
_FPN = dict(type='FPN', in_channels=[16, 32], out_channels=16, num_outs=3)


def _ssd() -> dict:
    levels = (16, 1280, 32, 16)
    relu6 = dict(type='ReLU6')
    return dict(
        type='SingleStageDetector',
        data_preprocessor=_PREPROCESSOR,
        backbone=dict(type='MobileNetV2', widen_factor=0.125, out_indices=(4, 7), norm_cfg=_NORM),
        neck=dict(
            type='SSDNeck',
            in_channels=levels[:2],
            out_channels=levels,
            level_strides=(2, 2),
            level_paddings=(1, 1),
            l2_norm_scale=None,
            use_depthwise=True,
            norm_cfg=_NORM,
            act_cfg=relu6,
        ),
        bbox_head=dict(
            type='SSDHead',
            in_channels=levels,
            num_classes=NUM_CLASSES,
            use_depthwise=True,
            norm_cfg=_NORM,
            act_cfg=relu6,
            bbox_coder=_DELTA,
            anchor_generator=dict(
                type='SSDAnchorGenerator',
                scale_major=False,
                strides=[16, 32, 64, 64],
                ratios=[[2], [2, 3], [2, 3], [2, 3]],
                min_sizes=[12, 20, 32, 48],
                max_sizes=[20, 32, 48, 64],
            ),
        ),
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0.0,
                ignore_iof_thr=-1,
                gt_max_assign_all=False,
            ),
            sampler=dict(type='PseudoSampler'),
            smoothl1_beta=1.0,
            allowed_border=-1,
            pos_weight=-1,
            neg_pos_ratio=3,
            debug=False,
        ),
        test_cfg=_TEST,
    )


def _retinanet() -> dict:
    return dict(
        type='RetinaNet',
        data_preprocessor=_PREPROCESSOR,
        backbone=_RESNET,
        neck=dict(_FPN, add_extra_convs='on_input'),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=NUM_CLASSES,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=2,
                scales_per_octave=1,
                ratios=[0.5, 1.0, 2.0],
                strides=[8, 16, 32],
            ),
            bbox_coder=dict(_DELTA, target_stds=[1.0] * 4),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss'),
        ),
        train_cfg=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        test_cfg=_TEST,
    )


def _yolox() -> dict:
    return dict(
        type='YOLOX',
        data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
        backbone=dict(
            type='CSPDarknet',
            arch_ovewrite=_TWO_STAGES,
            deepen_factor=0.33,
            widen_factor=0.125,
            out_indices=(1, 2),
            use_depthwise=True,
            norm_cfg=_NORM,
            act_cfg=dict(type='Swish'),
        ),
        neck=dict(
            type='YOLOXPAFPN',
            in_channels=[16, 32],
            out_channels=16,
            num_csp_blocks=1,
            use_depthwise=True,
            norm_cfg=_NORM,
            act_cfg=dict(type='Swish'),
        ),
        bbox_head=dict(
            type='YOLOXHead',
            num_classes=NUM_CLASSES,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            strides=(4, 8),
            use_depthwise=True,
            norm_cfg=_NORM,
            act_cfg=dict(type='Swish'),
        ),
        train_cfg=dict(assigner=dict(type='SimOTAAssigner', center_radius=2.5)),
        test_cfg=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.65), max_per_img=20),
    )


def _rtmdet() -> dict:
    silu = dict(type='SiLU', inplace=True)
    return dict(
        type='RTMDet',
        data_preprocessor=_PREPROCESSOR,
        backbone=dict(
            type='CSPNeXt',
            arch_ovewrite=_TWO_STAGES,
            expand_ratio=0.5,
            deepen_factor=0.33,
            widen_factor=0.125,
            out_indices=(1, 2),
            channel_attention=True,
            norm_cfg=_NORM,
            act_cfg=silu,
        ),
        neck=dict(
            type='CSPNeXtPAFPN',
            in_channels=[16, 32],
            out_channels=16,
            num_csp_blocks=1,
            expand_ratio=0.5,
            norm_cfg=_NORM,
            act_cfg=silu,
        ),
        bbox_head=dict(
            type='RTMDetSepBNHead',
            num_classes=NUM_CLASSES,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[4, 8]),
            bbox_coder=dict(type='DistancePointBBoxCoder'),
            loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
            loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
            with_objectness=False,
            exp_on_reg=True,
            share_conv=True,
            pred_kernel_size=1,
            norm_cfg=_NORM,
            act_cfg=silu,
        ),
        train_cfg=dict(
            assigner=dict(type='DynamicSoftLabelAssigner', topk=13), allowed_border=-1, pos_weight=-1, debug=False
        ),
        test_cfg=_TEST,
    )


def _faster_rcnn() -> dict:
    return dict(
        type='FasterRCNN',
        data_preprocessor=_PREPROCESSOR,
        backbone=_RESNET,
        neck=_FPN,
        rpn_head=dict(
            type='RPNHead',
            in_channels=16,
            feat_channels=16,
            anchor_generator=dict(type='AnchorGenerator', scales=[2], ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32]),
            bbox_coder=dict(_DELTA, target_stds=[1.0] * 4),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss'),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=5, sampling_ratio=0),
                out_channels=16,
                featmap_strides=[8, 16],
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=16,
                fc_out_channels=32,
                roi_feat_size=5,
                num_classes=NUM_CLASSES,
                bbox_coder=_DELTA,
                reg_class_agnostic=False,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False),
                loss_bbox=dict(type='L1Loss'),
            ),
        ),
        train_cfg=None,
        test_cfg=dict(
            rpn=dict(nms_pre=100, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
            rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20),
        ),
    )


MODELS = {'ssd': _ssd, 'retinanet': _retinanet, 'yolox': _yolox, 'rtmdet': _rtmdet, 'faster_rcnn': _faster_rcnn}


def tiny_model_cfg(kind: str) -> dict:
    """The ``model`` of a tiny detector's config.

    Args:
        kind: ``'ssd'`` (depthwise SSDLite), ``'retinanet'`` (one head for all levels), ``'yolox'`` (depthwise),
            ``'rtmdet'`` (head convolutions shared by several normalisations) or ``'faster_rcnn'``.

    Raises:
        PTQError: The kind is unknown.
    """
    if kind not in MODELS:
        raise PTQError(f'there is no tiny detector {kind!r}.{did_you_mean(kind, MODELS)} Known: {", ".join(MODELS)}.')
    return copy.deepcopy(MODELS[kind]())
