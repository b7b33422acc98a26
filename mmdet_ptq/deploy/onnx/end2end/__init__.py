"""Exported graphs that give detections: decoding, suppression, regions and masks between and behind the layers."""

from mmdet_ptq.deploy.onnx.end2end.choice import check_end2end, end2end_trouble, end_to_end

__all__ = ['check_end2end', 'end2end_trouble', 'end_to_end']
