"""Quantizes a detector: python tools/ptq.py CONFIG [CHECKPOINT]."""

from mmdet_ptq.cli import ptq

if __name__ == '__main__':
    ptq()
