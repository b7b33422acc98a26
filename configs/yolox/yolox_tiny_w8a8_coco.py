# python tools/ptq.py configs/yolox/yolox_tiny_w8a8_coco.py
_base_ = ['mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', '../_ptq_/w8a8.py']

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/yolox/yolox_tiny_8x8_300e_coco/yolox_tiny_8x8_300e_coco_20211124_171234-b4047906.pth'
