"""Evaluates a quantized checkpoint: python tools/test.py CONFIG quantized.pth."""

from mmdet_ptq.cli import test

if __name__ == '__main__':
    test()
