# The NanoDet project publishes the checkpoint, so the command names it:
#   python tools/ptq.py configs/nanodet/nanodet_m_w8a8_coco.py nanodet_m.ckpt
_base_ = ['./nanodet_m_float.py', '../_ptq_/w8a8.py']

ptq = dict(export=['ncnn'])
