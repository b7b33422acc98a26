# The embedded default: SSDLite on generated data, 8 bits throughout. Runs anywhere, without downloads:
#   python tools/ptq.py configs/ssdlite_mbv2_ptq.py
_base_ = './ssdlite_mbv2_float.py'

load_from = '{{ fileDirname }}/checkpoints/ssdlite_mbv2_embedded.pth'
work_dir = './work_dirs/ssdlite_mbv2_ptq'
ptq = dict(preset='w8a8', calibration=dict(num_images=128, seed=0))
