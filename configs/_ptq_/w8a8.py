# Everything in 8 bits, head and outputs included, then the filtered global loss.
ptq = dict(preset='w8a8')
