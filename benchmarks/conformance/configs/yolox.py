# YOLOX: SiLU, plain convolutions, nothing but a division by 255 less in front: activations range wide.
_base_ = './base.py'

norm_cfg = dict(type='BN', momentum=0.03, eps=0.001)
act_cfg = dict(type='Swish')
model = dict(
    type='YOLOX',
    data_preprocessor=dict(type='DetDataPreprocessor'),
    backbone=dict(
        type='CSPDarknet',
        widen_factor=0.25,
        arch_ovewrite=[
            [64, 128, 1, True, False],
            [128, 192, 1, True, False],
            [192, 256, 1, True, False],
            [256, 384, 1, False, True],
        ],
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
    ),
    neck=dict(
        type='YOLOXPAFPN',
        in_channels=[48, 64, 96],
        out_channels=48,
        num_csp_blocks=1,
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
    ),
    bbox_head=dict(
        type='YOLOXHead', num_classes=6, in_channels=48, feat_channels=32, norm_cfg=norm_cfg, act_cfg=act_cfg
    ),
    train_cfg=dict(assigner=dict(type='SimOTAAssigner', center_radius=2.5)),
    test_cfg=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.65), max_per_img=100),
)
