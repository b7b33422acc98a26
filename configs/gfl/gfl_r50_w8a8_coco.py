# python tools/ptq.py configs/gfl/gfl_r50_w8a8_coco.py
_base_ = ['mmdet::gfl/gfl_r50_fpn_1x_coco.py', '../_ptq_/w8a8.py']

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r50_fpn_1x_coco/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth'
