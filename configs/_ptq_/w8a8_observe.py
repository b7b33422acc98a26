# Everything in 8 bits from range observers alone.
ptq = dict(preset='w8a8_observe')
