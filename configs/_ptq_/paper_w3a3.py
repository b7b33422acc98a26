# The protocol of Reg-PTQ's tables: 3-bit weights, 3-bit activations, first layer 8-bit, output layers float.
ptq = dict(preset='paper_w3a3')
