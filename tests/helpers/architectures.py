"""Tiny detectors of kinds that the package's own tiny detectors leave out: transformers, masks, cascades."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mask_architectures import condinst, solo, yolact
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_ptq.testing import tiny_batch, tiny_detector
from mmdet_ptq.testing.models import MODELS, NUM_CLASSES, tiny_model_cfg


def _retinanet(backbone: dict, channels: list[int]) -> dict:
    model = tiny_model_cfg('retinanet')
    model['backbone'] = backbone
    model['neck'].update(in_channels=channels, add_extra_convs='on_input')
    return model


def swin() -> dict:
    """Windows, shifted windows, linear layers on (N, L, C) and on (N, H, W, C)."""
    return _retinanet(
        dict(
            type='SwinTransformer',
            embed_dims=16,
            depths=(2, 2, 2),
            num_heads=(1, 2, 4),
            strides=(4, 2, 2),
            window_size=7,
            mlp_ratio=2,
            out_indices=(1, 2),
            convert_weights=False,
        ),
        [32, 64],
    )


def sepbn() -> dict:
    """A head whose convolutions have two names each, one per level, and a normalisation per level."""
    model = tiny_model_cfg('retinanet')
    model['backbone'].update(num_stages=2, strides=(2, 2), dilations=(1, 1), out_indices=(0, 1))
    model['neck'].update(in_channels=[8, 16], num_outs=2)
    model['bbox_head'].update(type='RetinaSepBNHead', num_ins=2, norm_cfg=dict(type='BN'))
    model['bbox_head']['anchor_generator']['strides'] = [8, 16]
    return model


def tood() -> dict:
    """Deformable convolutions with masks, and without them and weights of their own: these only sample."""
    model = sepbn()
    model['type'] = 'TOOD'
    model['bbox_head'] = dict(
        type='TOODHead',
        num_classes=NUM_CLASSES,
        in_channels=16,
        feat_channels=16,
        stacked_convs=2,
        num_dcn=1,
        anchor_type='anchor_free',
        norm_cfg=None,
        anchor_generator=dict(
            type='AnchorGenerator', ratios=[1.0], octave_base_scale=2, scales_per_octave=1, strides=[8, 16]
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
        initial_loss_cls=dict(type='FocalLoss', use_sigmoid=True, activated=True),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, activated=True, beta=2.0),
        loss_bbox=dict(type='GIoULoss'),
    )
    model['train_cfg'] = None
    return model


def dyhead() -> dict:
    """Offsets of a deformable convolution are those of another level, a hard sigmoid stands behind a convolution."""
    model = sepbn()
    model['neck'] = [model['neck'], dict(type='DyHead', in_channels=16, out_channels=16, num_blocks=1)]
    return model


def pvt() -> dict:
    """Blocks of tokens whose last layer may be a convolution."""
    return _retinanet(
        dict(
            type='PyramidVisionTransformerV2',
            embed_dims=16,
            num_layers=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            sr_ratios=[4, 2, 1, 1],
            mlp_ratios=[2, 2, 2, 2],
            out_indices=(1, 2),
        ),
        [16, 32],
    )


def mask_rcnn() -> dict:
    """A mask branch reads its own regions."""
    model = tiny_model_cfg('faster_rcnn')
    model['type'] = 'MaskRCNN'
    extractor = copy.deepcopy(model['roi_head']['bbox_roi_extractor'])
    model['roi_head'].update(
        mask_roi_extractor=extractor,
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=1,
            in_channels=extractor['out_channels'],
            conv_out_channels=16,
            num_classes=NUM_CLASSES,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
        ),
    )
    model['test_cfg']['rcnn']['mask_thr_binary'] = 0.5
    return model


def groie() -> dict:
    """Extractors of regions that have layers of their own: every level's regions pass one, their sum another."""
    model = mask_rcnn()
    for name in ('bbox_roi_extractor', 'mask_roi_extractor'):
        extractor = model['roi_head'][name]
        channels = extractor['out_channels']
        extractor.update(
            type='GenericRoIExtractor',
            aggregation='sum',
            pre_cfg=dict(type='ConvModule', in_channels=channels, out_channels=channels, kernel_size=3, padding=1),
            post_cfg=dict(
                type='GeneralizedAttention', in_channels=channels, num_heads=2, attention_type='0100', kv_stride=2
            ),
        )
    return model


def point_rend() -> dict:
    """A head refines masks, point by point."""
    model = mask_rcnn()
    model['type'], head = 'PointRend', model['roi_head']
    channels = head['mask_head']['in_channels']
    head.update(
        type='PointRendRoIHead',
        mask_roi_extractor=dict(
            type='GenericRoIExtractor',
            aggregation='concat',
            roi_layer=dict(type='SimpleRoIAlign', output_size=14),
            out_channels=channels,
            featmap_strides=[8],
        ),
        mask_head=dict(
            type='CoarseMaskHead',
            num_fcs=1,
            in_channels=channels,
            conv_out_channels=16,
            fc_out_channels=32,
            num_classes=NUM_CLASSES,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0),
        ),
        point_head=dict(
            type='MaskPointHead',
            num_fcs=1,
            in_channels=channels,
            fc_channels=16,
            num_classes=NUM_CLASSES,
            coarse_pred_each_layer=True,
            loss_point=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0),
        ),
    )
    model['test_cfg']['rcnn'].update(
        subdivision_steps=2, subdivision_num_points=49, scale_factor=2, mask_thr_binary=0.5
    )
    return model


def cascade_rcnn() -> dict:
    """The second of two stages reads the regions that the first one moved."""
    model = tiny_model_cfg('faster_rcnn')
    model['type'], head = 'CascadeRCNN', model['roi_head']
    box_head = dict(head['bbox_head'], reg_class_agnostic=True)
    model['roi_head'] = dict(
        type='CascadeRoIHead',
        num_stages=2,
        stage_loss_weights=[1, 0.5],
        bbox_roi_extractor=head['bbox_roi_extractor'],
        bbox_head=[copy.deepcopy(box_head), copy.deepcopy(box_head)],
    )
    return model


def cascade_mask_rcnn(kind: str = 'Cascade') -> dict:
    """Masks of both stages, of which mmdet takes the mean."""
    model, masks = cascade_rcnn(), mask_rcnn()
    roi_head = model['roi_head']
    model['type'] = 'CascadeRCNN' if kind == 'Cascade' else 'HybridTaskCascade'
    roi_head['type'] = f'{kind}RoIHead'
    roi_head['mask_roi_extractor'] = masks['roi_head']['mask_roi_extractor']
    mask_head = masks['roi_head']['mask_head']
    roi_head['mask_head'] = [copy.deepcopy(mask_head) for _ in range(2)]
    model['test_cfg'] = masks['test_cfg']
    return model


def htc() -> dict:
    """The same, where a stage's mask head reads what the one before made of the features."""
    model = cascade_mask_rcnn('HybridTaskCascade')
    for place, mask_head in enumerate(model['roi_head']['mask_head']):
        mask_head.update(type='HTCMaskHead', conv_out_channels=mask_head['in_channels'], with_conv_res=place > 0)
    return model


def query_inst() -> dict:
    """Queries stand for the regions of every image, and a head compares those of one image with each other."""
    model = tiny_model_cfg('faster_rcnn')
    model['type'], head = 'QueryInst', model['roi_head']
    extractor, embed, stages = head['bbox_roi_extractor'], dict(in_channels=16, out_channels=16), 1
    dynamic = dict(type='DynamicConv', feat_channels=8, input_feat_shape=5, norm_cfg=dict(type='LN'), **embed)
    box_head = dict(
        type='DIIHead',
        num_classes=NUM_CLASSES,
        num_heads=2,
        num_reg_fcs=1,
        feedforward_channels=32,
        in_channels=16,
        dynamic_conv_cfg=dynamic,
        bbox_coder=dict(head['bbox_head']['bbox_coder'], clip_border=False),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss'),
        loss_iou=dict(type='GIoULoss'),
    )
    mask_head = dict(
        type='DynamicMaskHead',
        dynamic_conv_cfg=dict(dynamic, with_proj=False),
        num_convs=1,
        num_classes=NUM_CLASSES,
        roi_feat_size=5,
        in_channels=16,
        conv_out_channels=16,
        class_agnostic=False,
        loss_mask=dict(type='DiceLoss', use_sigmoid=True, activate=False),
    )
    model['rpn_head'] = dict(type='EmbeddingRPNHead', num_proposals=10, proposal_feature_channel=16)
    model['roi_head'] = dict(
        type='SparseRoIHead',
        num_stages=stages,
        stage_loss_weights=[1] * stages,
        proposal_feature_channel=16,
        bbox_roi_extractor=extractor,
        mask_roi_extractor=copy.deepcopy(extractor),
        bbox_head=[copy.deepcopy(box_head) for _ in range(stages)],
        mask_head=[copy.deepcopy(mask_head) for _ in range(stages)],
    )
    costs = [dict(type='FocalLossCost'), dict(type='BBoxL1Cost', box_format='xyxy'), dict(type='IoUCost')]
    matched = dict(
        assigner=dict(type='HungarianAssigner', match_costs=costs),
        sampler=dict(type='PseudoSampler'),
        pos_weight=1,
        mask_size=10,
    )
    model['train_cfg'] = dict(rpn=None, rcnn=[copy.deepcopy(matched) for _ in range(stages)])
    model['test_cfg'] = dict(rpn=None, rcnn=dict(max_per_img=10, mask_thr_binary=0.5))
    return model


def deformable_detr() -> dict:
    """Feed-forward networks that write into views."""
    layer = dict(
        self_attn_cfg=dict(embed_dims=32, num_levels=2, batch_first=True),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=48),
    )
    decoder = dict(
        self_attn_cfg=dict(embed_dims=32, num_heads=4, batch_first=True),
        cross_attn_cfg=dict(embed_dims=32, num_levels=2, batch_first=True),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=48),
    )
    retinanet = tiny_model_cfg('retinanet')
    return dict(
        type='DeformableDETR',
        num_queries=20,
        num_feature_levels=2,
        with_box_refine=False,
        as_two_stage=False,
        data_preprocessor=retinanet['data_preprocessor'],
        backbone=retinanet['backbone'],
        neck=dict(
            type='ChannelMapper',
            in_channels=retinanet['neck']['in_channels'],
            kernel_size=1,
            out_channels=32,
            act_cfg=None,
            norm_cfg=dict(type='GN', num_groups=4),
            num_outs=2,
        ),
        encoder=dict(num_layers=2, layer_cfg=layer),
        decoder=dict(num_layers=2, return_intermediate=True, layer_cfg=decoder, post_norm_cfg=None),
        positional_encoding=dict(num_feats=16, normalize=True, offset=-0.5),
        bbox_head=dict(
            type='DeformableDETRHead',
            num_classes=NUM_CLASSES,
            embed_dims=32,
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        ),
        test_cfg=dict(max_per_img=20),
    )


def two_stage_detr() -> dict:
    """The encoder chooses the decoder's queries by their scores."""
    model = deformable_detr()
    # twice the width of a position's encoding, which mmdet fixes at 128 numbers a coordinate
    model.update(as_two_stage=True, with_box_refine=True, positional_encoding=dict(num_feats=128, normalize=True))
    model['neck']['out_channels'] = model['bbox_head']['embed_dims'] = 256
    for part in ('encoder', 'decoder'):
        for cfg in model[part]['layer_cfg'].values():
            cfg['embed_dims'] = 256
    return model


def mask2former() -> dict:
    """Queries that find masks, and attend where the layer before saw one."""
    retinanet = tiny_model_cfg('retinanet')
    attention = dict(embed_dims=32, num_heads=4, batch_first=True)
    ffn = dict(embed_dims=32, feedforward_channels=48)
    encoder = dict(self_attn_cfg=dict(embed_dims=32, num_heads=4, num_levels=1, batch_first=True), ffn_cfg=ffn)
    decoder = dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn)
    return dict(
        type='Mask2Former',
        data_preprocessor=retinanet['data_preprocessor'],
        backbone=retinanet['backbone'],
        panoptic_head=dict(
            type='Mask2FormerHead',
            in_channels=[16, 32],
            strides=[8, 16],
            feat_channels=32,
            out_channels=32,
            num_things_classes=NUM_CLASSES,
            num_stuff_classes=0,
            num_queries=20,
            num_transformer_feat_level=1,
            pixel_decoder=dict(
                type='MSDeformAttnPixelDecoder',
                num_outs=1,
                norm_cfg=dict(type='GN', num_groups=4),
                act_cfg=dict(type='ReLU'),
                encoder=dict(num_layers=1, layer_cfg=encoder),
                positional_encoding=dict(num_feats=16, normalize=True),
            ),
            enforce_decoder_input_project=False,
            positional_encoding=dict(num_feats=16, normalize=True),
            transformer_decoder=dict(return_intermediate=True, num_layers=2, layer_cfg=decoder),
            loss_cls=dict(type='CrossEntropyLoss', class_weight=[1.0] * NUM_CLASSES + [0.1]),
        ),
        panoptic_fusion_head=dict(
            type='MaskFormerFusionHead', num_things_classes=NUM_CLASSES, num_stuff_classes=0, loss_panoptic=None
        ),
        test_cfg=dict(panoptic_on=False, semantic_on=False, instance_on=True, max_per_image=20),
    )


ARCHITECTURES: dict[str, Callable[[], dict]] = dict(
    swin=swin,
    sepbn=sepbn,
    tood=tood,
    dyhead=dyhead,
    pvt=pvt,
    mask_rcnn=mask_rcnn,
    groie=groie,
    point_rend=point_rend,
    solo=solo,
    yolact=yolact,
    condinst=condinst,
    cascade_rcnn=cascade_rcnn,
    cascade_mask_rcnn=cascade_mask_rcnn,
    htc=htc,
    query_inst=query_inst,
    deformable_detr=deformable_detr,
    two_stage_detr=two_stage_detr,
    mask2former=mask2former,
)


def register(monkeypatch) -> None:
    """Lets ``tiny_quantized`` build them for a while."""
    for name, make in ARCHITECTURES.items():
        monkeypatch.setitem(MODELS, name, make)


def sized_batch(height: int, width: int, num_images: int = 2, seed: int = 0) -> dict:
    """``tiny_batch`` in another size."""
    batch = tiny_batch(num_images, seed)
    batch['inputs'] = [F.interpolate(x[None].float(), (height, width))[0].to(torch.uint8) for x in batch['inputs']]
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(img_shape=(height, width), ori_shape=(height, width)))
    return batch


def semi_supervised_cfg(inner: dict, **test_cfg) -> dict:
    """SoftTeacher around a tiny detector's config."""
    return dict(
        type='SoftTeacher',
        detector=inner,
        data_preprocessor=dict(type='MultiBranchDataPreprocessor', data_preprocessor=inner['data_preprocessor']),
        semi_train_cfg=dict(freeze_teacher=True),
        semi_test_cfg=test_cfg or dict(predict_on='teacher'),
    )


def semi_supervised(kind: str, seed: int = 0, **test_cfg) -> nn.Module:
    """SoftTeacher with a tiny detector as teacher and another one as student."""
    init_default_scope('mmdet')
    wrapper = MMDET_MODELS.build(ConfigDict(semi_supervised_cfg(tiny_model_cfg(kind), **test_cfg)))
    wrapper.teacher.load_state_dict(tiny_detector(kind, seed).state_dict())
    wrapper.student.load_state_dict(tiny_detector(kind, seed + 5).state_dict())
    return wrapper.eval()
