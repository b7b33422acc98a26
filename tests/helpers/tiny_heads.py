"""Heads of one stage as config dicts, three levels each."""

from __future__ import annotations

from mmdet_ptq.testing import NUM_CLASSES, tiny_model_cfg

STRIDES = [8, 16, 32]
POINTS = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=STRIDES)


def common(channels: int) -> dict:
    """What most heads have.

    Args:
        channels: Of their input and inside.
    """
    return dict(num_classes=NUM_CLASSES, in_channels=channels, feat_channels=channels, stacked_convs=1)


def one_stage_heads(channels: int, coder: dict) -> dict[str, dict]:
    """A head of each kind.

    Args:
        channels: See :func:`common`.
        coder: Config of the box coder of those that have anchors.
    """
    shared = common(channels)
    return dict(
        ssd=dict(
            type='SSDHead',
            num_classes=NUM_CLASSES,
            in_channels=(channels,) * 3,
            bbox_coder=coder,
            anchor_generator=dict(
                type='SSDAnchorGenerator',
                scale_major=False,
                strides=STRIDES,
                ratios=[[2], [2, 3], [2, 3]],
                min_sizes=[12, 20, 32],
                max_sizes=[20, 32, 48],
            ),
        ),
        atss=dict(shared, type='ATSSHead', anchor_generator=POINTS, bbox_coder=coder, norm_cfg=None),
        fcos=dict(shared, type='FCOSHead', strides=STRIDES, norm_cfg=None),
        gfl=dict(
            shared,
            type='GFLHead',
            anchor_generator=POINTS,
            norm_cfg=None,
            reg_max=4,
            loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
        ),
        rtmdet=dict(
            tiny_model_cfg('rtmdet')['bbox_head'],
            anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=STRIDES),
        ),
        yolox=dict(shared, type='YOLOXHead', strides=tuple(STRIDES), norm_cfg=dict(type='BN')),
    )
