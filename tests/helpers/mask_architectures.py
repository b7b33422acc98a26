"""Tiny detectors of one stage that find masks."""

from __future__ import annotations

from mmdet_ptq.testing.models import NUM_CLASSES, tiny_model_cfg


def solo() -> dict:
    """One head of masks without boxes."""
    model = tiny_model_cfg('retinanet')
    model['type'] = 'SOLO'
    model['neck'].update(num_outs=5)
    del model['bbox_head']
    model['mask_head'] = dict(
        type='SOLOHead',
        num_classes=NUM_CLASSES,
        in_channels=model['neck']['out_channels'],
        stacked_convs=1,
        feat_channels=16,
        strides=[8, 8, 16, 32, 32],
        scale_ranges=((1, 16), (8, 32), (16, 64), (32, 128), (64, 256)),
        num_grids=[8, 6, 4, 3, 2],
        loss_mask=dict(type='DiceLoss', use_sigmoid=True, loss_weight=3.0),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        norm_cfg=dict(type='GN', num_groups=4),
    )
    model['test_cfg'] = dict(
        nms_pre=100, score_thr=0.01, mask_thr=0.5, filter_thr=0.001, kernel='gaussian', sigma=2.0, max_per_img=20
    )
    return model


def yolact() -> dict:
    """Masks are sums of prototypes, by coefficients of their boxes."""
    model = tiny_model_cfg('retinanet')
    model['type'], head = 'YOLACT', model['bbox_head']
    channels = model['neck']['out_channels']
    keys = ('num_classes', 'anchor_generator', 'bbox_coder')
    model['bbox_head'] = dict(
        type='YOLACTHead',
        in_channels=channels,
        feat_channels=16,
        num_head_convs=1,
        num_protos=8,
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, reduction='none'),
        loss_bbox=dict(type='SmoothL1Loss'),
        **{key: head[key] for key in keys},
    )
    model['mask_head'] = dict(
        type='YOLACTProtonet',
        in_channels=channels,
        num_protos=8,
        num_classes=NUM_CLASSES,
        proto_channels=(16, None, 8),
        proto_kernel_sizes=(3, -2, 1),
        max_masks_to_train=10,
    )
    model['test_cfg'] = dict(
        nms_pre=100,
        min_bbox_size=0,
        score_thr=0.05,
        iou_thr=0.5,
        top_k=100,
        max_per_img=20,
        mask_thr=0.5,
        mask_thr_binary=0.5,
    )
    return model


def condinst() -> dict:
    """Each object draws its mask with a small network of its own."""
    model = tiny_model_cfg('retinanet')
    channels = model['neck']['out_channels']
    model['type'] = 'CondInst'
    model['bbox_head'] = dict(
        type='CondInstBboxHead',
        num_params=169,
        num_classes=NUM_CLASSES,
        in_channels=channels,
        feat_channels=16,
        stacked_convs=1,
        strides=[8, 16],
        norm_on_bbox=True,
        centerness_on_reg=True,
        norm_cfg=None,
        conv_bias=True,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='GIoULoss'),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True),
    )
    model['mask_head'] = dict(
        type='CondInstMaskHead',
        mask_out_stride=4,
        mask_feature_head=dict(
            in_channels=channels,
            feat_channels=16,
            start_level=0,
            end_level=1,
            out_channels=8,
            mask_stride=8,
            num_stacked_convs=1,
            norm_cfg=dict(type='BN'),
        ),
        loss_mask=dict(type='DiceLoss'),
    )
    nms = dict(type='nms', iou_threshold=0.6)
    model['test_cfg'] = dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=nms, max_per_img=20, mask_thr=0.5)
    return model
