# 4-bit weights (log-affine or affine by error), 8-bit activations; image and output layers in 8 bits.
ptq = dict(preset='w4a8')
