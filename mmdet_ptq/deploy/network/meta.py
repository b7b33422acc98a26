"""What an exported model says about itself, as the text that its file carries."""

from __future__ import annotations

import json

from torch import nn

from mmdet_ptq.wrapping.names import layer_of


def input_meta(detector: nn.Module, channels: int) -> dict:
    """What a program without mmdet must know to feed a model and to read what it finds.

    Args:
        detector: The detector, with mmdet's data preprocessor.
        channels: How many channels its images have.

    Returns:
        ``dict(channels, mean, std, pad_value, classes)``: ``'RGB'``, ``'BGR'`` or ``'GRAY'`` (of images that are read
        as BGR, as mmcv does; left out where they have other channels), what is subtracted from and divided out of
        pixels of 0 .. 255, and the names of the labels; what the detector does not tell is left out.
    """
    preprocessor = getattr(detector, 'data_preprocessor', None)
    told = {}
    if hasattr(preprocessor, '_channel_conversion'):
        names = {1: 'GRAY', 3: 'RGB' if preprocessor._channel_conversion else 'BGR'}
        told |= dict(channels=names[channels]) if channels in names else {}
        told['pad_value'] = preprocessor.pad_value
    if getattr(preprocessor, '_enable_normalize', False):
        told['mean'], told['std'] = preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()
    classes = (getattr(detector, 'dataset_meta', None) or {}).get('classes')
    return {**told, 'classes': list(classes)} if classes else told


def write_meta(meta: dict) -> str:
    """The text; each layer is named once, not with each of its calls.

    Args:
        meta: See :func:`mmdet_ptq.deploy.onnx.export.model_meta`.
    """
    calls = [call if layer_of(call) == layer else [call, layer] for call, layer in meta['layers'].items()]
    return json.dumps({**meta, 'layers': calls}, separators=(',', ':'))


def read_meta(text: str) -> dict:
    """Inverse of :func:`write_meta`; reads what older versions wrote, too."""
    meta = json.loads(text)
    if isinstance(meta['layers'], list):
        meta['layers'] = dict(call if isinstance(call, list) else (call, layer_of(call)) for call in meta['layers'])
    return meta
