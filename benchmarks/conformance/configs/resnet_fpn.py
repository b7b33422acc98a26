# What the members on a residual network share: three stages of ResNet-18 with a quarter of its channels. GFL and
# Mask R-CNN start from the backbone of ATSS.
_base_ = './short.py'

model = dict(
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=16,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_eval=False,
    ),
    neck=dict(type='FPN', in_channels=[16, 32, 64], start_level=1, out_channels=32, num_outs=3),
)
