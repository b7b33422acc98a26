# 2-bit weights, 4-bit activations; image and output layers in 8 bits.
ptq = dict(preset='w2a4')
