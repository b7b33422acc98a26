# The protocol of Reg-PTQ's tables: 4-bit weights, 8-bit activations, first layer 8-bit, output layers float.
ptq = dict(preset='paper_w4a8')
