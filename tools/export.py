"""Writes a quantized checkpoint as a model for a runtime: python tools/export.py quantized.pth --to onnxruntime."""

from mmdet_ptq.cli import export

if __name__ == '__main__':
    export()
