# GFL: boxes as distributions, whose expectation is taken behind the network.
_base_ = './resnet_fpn.py'

model = dict(
    type='GFL',
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint='{{ fileDirname }}/../weights/atss.pth', prefix='backbone.')
    ),
    bbox_head=dict(
        type='GFLHead',
        num_classes=6,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        reg_max=8,
        norm_cfg=dict(type='BN'),
        anchor_generator=dict(
            type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16, 32]
        ),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.01, nms=dict(type='nms', iou_threshold=0.6), max_per_img=100
    ),
)
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=max_epochs, end=max_epochs, convert_to_iter_based=True, eta_min_ratio=0.01),
]
