# python tools/ptq.py configs/retinanet/retinanet_r18_w8a8_coco.py
_base_ = ['mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', '../_ptq_/w8a8.py']

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r18_fpn_1x_coco/retinanet_r18_fpn_1x_coco_20220407_171055-614fd399.pth'
