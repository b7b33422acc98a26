"""What an exported model says about itself, as the text that its file carries."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from mmdet_ptq.deploy.network.seal import BLANK, CHECKSUM, check_seal
from mmdet_ptq.errors import PTQError
from mmdet_ptq.fields import Each, Fields, Malformed, Whole, check_form, check_plain
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
    """The text; each layer is named once, not with each of its calls. It has a place for :func:`.seal.seal`.

    Args:
        meta: See :func:`mmdet_ptq.deploy.onnx.export.model_meta`.
    """
    calls = [call if layer_of(call) == layer else [call, layer] for call, layer in meta['layers'].items()]
    return json.dumps({**meta, 'layers': calls, CHECKSUM: BLANK}, separators=(',', ':'))


def read_meta(text: str) -> dict:
    """Inverse of :func:`write_meta`; reads what older versions wrote, too."""
    meta = json.loads(text)
    if isinstance(meta['layers'], list):
        meta['layers'] = dict(call if isinstance(call, list) else (call, layer_of(call)) for call in meta['layers'])
    meta.pop(CHECKSUM, None)
    return meta


def called(meta: dict) -> list[str]:
    """The calls of layers and the products of activations that a network has, by their names."""
    return [*meta['layers'], *meta.get('products', ())]


def checked_meta(text: str, path: str | os.PathLike, *others: Path) -> dict:
    """The same of a file that anybody may have written, or damaged.

    Args:
        text: The text.
        path: The model that carries it.
        *others: The files beside it.

    Raises:
        PTQError: The text is damaged, or the files do not have their checksum.
    """
    try:
        told = json.loads(text)
        check_meta(told)
        check_seal(told.get(CHECKSUM), Path(path), *others)
        return read_meta(text)
    except (Malformed, RecursionError, ValueError) as error:
        why = f'{error}' if isinstance(error, Malformed) else 'what it says about itself cannot be read'
        raise PTQError(f'{str(path)!r} is damaged: {why}; export it again with tools/export.py.') from error


def check_meta(meta: Any) -> None:
    """Refuses what no export of ours says.

    Raises:
        Malformed: What is wrong.
    """
    check_plain(meta, 'its meta')
    check_form(meta, _META, 'its meta')
    shape = meta['input_shape']
    if len(shape) != 4 or math.prod(shape) > _LARGEST:
        raise Malformed(f'its input_shape is {shape[:8]}, which is no size of an image')
    places = sorted(_places(meta['outputs']))
    if places != list(range(len(places))) or not places or len(meta.get('raw_shapes', places)) < 1:
        raise Malformed('its outputs do not name each tensor once')
    if not meta.get('end2end') and len(meta.get('raw_shapes', places)) != len(places):
        raise Malformed(f'it tells {len(meta["raw_shapes"])} shapes of {len(places)} outputs')


def _layout(value: Any) -> str:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return ''
    inner = list(value.values()) if isinstance(value, dict) else value
    nested = isinstance(inner, list) and not any(map(_layout, inner))
    return '' if nested else 'must be lists of places, or places by name'


def _places(layout: Any) -> Iterator[int]:
    if isinstance(layout, int):
        yield layout
        return
    for inner in (layout.values() if isinstance(layout, dict) else layout) or ():
        yield from _places(inner)


# of an image, inside of one graph
MOST_REGIONS = 2048
# the largest image, with all its channels, and a batch of them
_LARGEST = 2**28
_SIZES = [Whole(0, 2**31)]
_OFFSETS = Each(list)
_INPUT = Fields({}, dict(channels=str, pad_value=(float, [float]), mean=[float], std=[float], classes=[str]))
_META = Fields(
    dict(
        format=str,
        version=str,
        runtime=str,
        input_shape=[Whole(1, 2**20)],
        dynamic_batch=bool,
        outputs=_layout,
        layers=(Each(str), [(str, [str])]),
    ),
    # what older versions did not write, or only some runtimes have
    dict(
        end2end=bool,
        size_divisor=Whole(1, 2**16),
        regions=Whole(1, MOST_REGIONS),
        raw_shapes=[_SIZES],
        input=_INPUT,
        products=[str],
        saturating=[str],
        space_to_depth=_OFFSETS,
        folded=_OFFSETS,
        shifts=Each([float]),
        parts=Each(str),
        inputs=[_SIZES],
        constants=list,
        weights=Whole(),
        checksum=str,
    ),
)
