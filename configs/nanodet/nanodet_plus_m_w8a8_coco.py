# The NanoDet project publishes the checkpoint, so the command names it:
#   python tools/ptq.py configs/nanodet/nanodet_plus_m_w8a8_coco.py nanodet-plus-m_320.pth
_base_ = ['./nanodet_plus_m_float.py', '../_ptq_/w8a8.py']

ptq = dict(export=['ncnn'])
