# python tools/ptq.py configs/dino/dino-4scale_r50_w8a8_coco.py
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', '../_ptq_/w8a8.py']

load_from = 'https://download.openmmlab.com/mmdetection/v3.0/dino/dino-4scale_r50_8xb2-12e_coco/dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth'
