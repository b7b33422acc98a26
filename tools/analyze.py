"""Finds the tensors that cost detections: python tools/analyze.py CONFIG [CHECKPOINT]."""

from mmdet_ptq.cli import analyze

if __name__ == '__main__':
    analyze()
