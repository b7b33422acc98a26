# python tools/ptq.py configs/detr/detr_r50_w8a8_coco.py
_base_ = ['mmdet::detr/detr_r50_8xb2-150e_coco.py', '../_ptq_/w8a8.py']

load_from = 'https://download.openmmlab.com/mmdetection/v3.0/detr/detr_r50_8xb2-150e_coco/detr_r50_8xb2-150e_coco_20221023_153551-436d03e8.pth'
