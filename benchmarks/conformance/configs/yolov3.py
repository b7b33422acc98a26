# YOLOv3 on MobileNetV2: LeakyReLU throughout, depthwise convolutions, three anchors at each place.
_base_ = './short.py'

act_cfg = dict(type='LeakyReLU', negative_slope=0.1)
model = dict(
    type='YOLOV3',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[0, 0, 0], std=[255.0, 255.0, 255.0], bgr_to_rgb=True),
    backbone=dict(type='MobileNetV2', widen_factor=0.25, out_indices=(2, 4, 6), act_cfg=act_cfg),
    neck=dict(type='YOLOV3Neck', num_scales=3, in_channels=[80, 24, 8], out_channels=[40, 32, 24]),
    bbox_head=dict(
        type='YOLOV3Head',
        num_classes=6,
        in_channels=[40, 32, 24],
        out_channels=[48, 48, 32],
        anchor_generator=dict(
            type='YOLOAnchorGenerator',
            base_sizes=[[(45, 50), (57, 66), (75, 80)], [(24, 26), (30, 36), (38, 40)], [(11, 13), (14, 18), (19, 20)]],
            strides=[32, 16, 8],
        ),
        bbox_coder=dict(type='YOLOBBoxCoder'),
        featmap_strides=[32, 16, 8],
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0, reduction='sum'),
        loss_conf=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0, reduction='sum'),
        loss_xy=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=2.0, reduction='sum'),
        loss_wh=dict(type='MSELoss', loss_weight=2.0, reduction='sum'),
    ),
    train_cfg=dict(assigner=dict(type='GridAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0)),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.01,
        conf_thr=0.005,
        nms=dict(type='nms', iou_threshold=0.45),
        max_per_img=100,
    ),
)
