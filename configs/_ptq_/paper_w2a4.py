# The protocol of Reg-PTQ's tables: 2-bit weights, 4-bit activations, first layer 8-bit, output layers float.
ptq = dict(preset='paper_w2a4')
