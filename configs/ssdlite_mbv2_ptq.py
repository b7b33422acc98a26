# The embedded default: SSDLite on generated data, 8 bits throughout. Runs anywhere, without downloads:
#   python tools/ptq.py configs/ssdlite_mbv2_ptq.py
_base_ = './ssdlite_mbv2_float.py'

load_from = '{{ fileDirname }}/checkpoints/ssdlite_mbv2_embedded.pth'
work_dir = './work_dirs/ssdlite_mbv2_ptq'
# ONNX Runtime where it is installed, which the set-up sees to; an import statement would be another style of config
ptq = dict(
    preset='w8a8',
    calibration=dict(num_images=128, seed=0),
    export=['onnxruntime'] * all(map(__import__('importlib.util').util.find_spec, ('onnxscript', 'onnxruntime'))),
)
