# RTMDet whose levels each have head convolutions of their own, and whose head returns the logarithm of distances.
_base_ = './rtmdet.py'

model = dict(bbox_head=dict(share_conv=False, exp_on_reg=True))
work_dir = './work_dirs/conformance/rtmdet_unshared'
