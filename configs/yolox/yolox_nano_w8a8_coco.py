# mmdet publishes no checkpoint of this size, so the command names one:
#   python tools/ptq.py configs/yolox/yolox_nano_w8a8_coco.py CHECKPOINT
_base_ = ['mmdet::yolox/yolox_nano_8xb8-300e_coco.py', '../_ptq_/w8a8.py']
