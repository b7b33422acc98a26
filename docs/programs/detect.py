"""Detects with a model of `tools/export.py --to onnxruntime --end2end`, without mmdet. python detect.py MODEL IMAGE"""

import json
import sys

import cv2
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
meta = json.loads(session.get_modelmeta().custom_metadata_map['mmdet_ptq'])
channels, height, width = meta['input_shape'][1:]

reading = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}  # in BGR
image = cv2.imread(sys.argv[2], reading.get(channels, cv2.IMREAD_UNCHANGED))
scale = min(height / image.shape[0], width / image.shape[1])
resized = cv2.resize(image, (int(image.shape[1] * scale + 0.5), int(image.shape[0] * scale + 0.5)))
resized = resized.reshape(*resized.shape[:2], channels)
if meta['input'].get('channels') == 'RGB':
    resized = resized[..., ::-1]
pixels = (resized - np.float32(meta['input'].get('mean', 0))) / np.float32(meta['input'].get('std', 1))
tensor = np.full((1, channels, height, width), meta['input']['pad_value'], np.float32)
tensor[0, :, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)

boxes, scores, labels = (output[0] for output in session.run(None, {'input': tensor}))
for box, score, label in zip(boxes / scale, scores, labels, strict=True):
    if label >= 0 and score > 0.3:
        print(meta['input']['classes'][label], f'{score:.2f}', box.round())
