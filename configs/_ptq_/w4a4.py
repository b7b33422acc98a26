# 4-bit weights and activations (weights as in w4a8); image and output layers in 8 bits.
ptq = dict(preset='w4a4')
