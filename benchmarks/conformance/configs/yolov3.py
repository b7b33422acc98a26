# YOLOv3 on two levels of a CSP network: LeakyReLU throughout, three anchors at each place. Its backbone starts from
# that of the YOLOX here, which learned with SiLU.
_base_ = './short.py'

act_cfg = dict(type='LeakyReLU', negative_slope=0.1)
model = dict(
    type='YOLOV3',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[0, 0, 0], std=[255.0, 255.0, 255.0], bgr_to_rgb=True),
    backbone=dict(
        type='CSPDarknet',
        widen_factor=0.25,
        arch_ovewrite=[[64, 128, 1, True, False], [128, 192, 1, True, False], [192, 256, 1, True, False]],
        out_indices=(2, 3),
        act_cfg=act_cfg,
        init_cfg=dict(type='Pretrained', checkpoint='{{ fileDirname }}/../weights/yolox.pth', prefix='backbone.'),
    ),
    neck=dict(type='YOLOV3Neck', num_scales=2, in_channels=[64, 48], out_channels=[48, 32]),
    bbox_head=dict(
        type='YOLOV3Head',
        num_classes=6,
        in_channels=[48, 32],
        out_channels=[64, 48],
        anchor_generator=dict(
            type='YOLOAnchorGenerator',
            base_sizes=[[(38, 40), (55, 58), (76, 78)], [(12, 13), (18, 20), (27, 28)]],
            strides=[16, 8],
        ),
        bbox_coder=dict(type='YOLOBBoxCoder'),
        featmap_strides=[16, 8],
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
