# RTMDet whose levels each have head convolutions of their own, whose head returns logarithms of distances, and which
# has an objectness. Trained on from the shared one.
_base_ = './rtmdet.py'

model = dict(bbox_head=dict(share_conv=False, exp_on_reg=True, with_objectness=True))
load_from = '{{ fileDirname }}/../weights/rtmdet.pth'
max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=max_epochs, end=max_epochs, convert_to_iter_based=True, eta_min_ratio=0.01),
]
