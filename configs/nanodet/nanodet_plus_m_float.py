# NanoDet-Plus-m 320 as its project publishes it, in float
_base_ = './nanodet_m_float.py'

model = dict(
    neck=dict(_delete_=True, type='NanoDetGhostPAN', in_channels=(116, 232, 464), out_channels=96, kernel=5),
    bbox_head=dict(
        kernel=5,
        # points where the cells begin, not in their middle
        anchor_generator=dict(center_offset=0.0, strides=[8, 16, 32, 64]),
    ),
)
