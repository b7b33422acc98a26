# ATSS on a Swin transformer: layer normalisation, GELU, and products of two activations in windows of 7 x 7, half of
# them shifted and masked.
_base_ = './atss.py'

max_epochs = 60
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=32,
        depths=(2, 2, 2),
        num_heads=(2, 4, 4),
        strides=(4, 2, 2),
        out_indices=(0, 1, 2),
        mlp_ratio=2,
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[32, 64, 128]),
)
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=max_epochs, end=max_epochs, convert_to_iter_based=True, eta_min_ratio=0.01),
]
