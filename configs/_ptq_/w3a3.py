# 3-bit weights, 3-bit activations; image and output layers in 8 bits.
ptq = dict(preset='w3a3')
