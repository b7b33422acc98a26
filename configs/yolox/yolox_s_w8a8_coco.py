# python tools/ptq.py configs/yolox/yolox_s_w8a8_coco.py
_base_ = ['mmdet::yolox/yolox_s_8xb8-300e_coco.py', '../_ptq_/w8a8.py']

load_from = 'https://download.openmmlab.com/mmdetection/v2.0/yolox/yolox_s_8x8_300e_coco/yolox_s_8x8_300e_coco_20211121_095711-4592a793.pth'
