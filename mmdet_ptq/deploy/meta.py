"""What an exported model says about itself, as the text that its file carries."""
from __future__ import annotations

import json


def write_meta(meta: dict) -> str:
    """The text; each layer is named once, not with each of its calls.

    Args:
        meta: See :func:`mmdet_ptq.deploy.onnx_export.model_meta`.
    """
    calls = [call if _layer(call) == layer else [call, layer] for call, layer in meta['layers'].items()]
    return json.dumps({**meta, 'layers': calls}, separators=(',', ':'))


def read_meta(text: str) -> dict:
    """Inverse of :func:`write_meta`; reads what older versions wrote, too."""
    meta = json.loads(text)
    if isinstance(meta['layers'], list):
        meta['layers'] = dict(call if isinstance(call, list) else (call, _layer(call)) for call in meta['layers'])
    return meta


def _layer(call: str) -> str:
    """The layer of a call, as :func:`mmdet_ptq.deploy.onnx_graph.name_layers` numbers calls."""
    return call.partition('#')[0]
