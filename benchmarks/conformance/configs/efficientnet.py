# RetinaNet on the first stages of EfficientNet with HardSwish: squeeze-and-excitation, as in MobileNetV3. Trained
# twice, the second time with --cfg-options load_from=benchmarks/conformance/weights/efficientnet.pth
_base_ = './short.py'

model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        type='EfficientNet',
        arch='b0',
        out_indices=(3,),
        act_cfg=dict(type='HSwish'),
        norm_cfg=dict(type='BN', eps=0.001),
    ),
    neck=dict(
        type='FPN',
        in_channels=[40],
        out_channels=48,
        num_outs=3,
        add_extra_convs='on_output',
        relu_before_extra_convs=True,
    ),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=6,
        in_channels=48,
        feat_channels=32,
        stacked_convs=2,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=2, scales_per_octave=2, ratios=[1.0], strides=[8, 16, 32]
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.01, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
    ),
)
# at 128 x 128 its training takes a quarter of an hour
_base_.train_pipeline[2].scale = (96, 96)
_base_.test_pipeline[1].scale = (96, 96)
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
