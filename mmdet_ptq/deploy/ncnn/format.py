"""ncnn's files: `.param` lists layers in text, `.bin` their weights one after another."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmdet_ptq.deploy.network.seal import BLANK, CHECKSUM, seal
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import remove, write_atomic, write_text

MAGIC = '7767517'
REMARK = '#'
FLOAT_MAX = 3.402823e38
# what precedes a weight in the .bin; biases and scales have no tag (ncnn src/modelbin.cpp)
INT8_TAG = np.uint32(0x000D4B38).tobytes()


@dataclass
class NcnnLayer:
    """One line of a `.param` and its part of the `.bin`.

    Attributes:
        type: ncnn's layer type.
        name: Unique name.
        bottoms: Blobs it reads.
        tops: Blobs it writes.
        params: Parameter id to value as it stands in the text; an array of id k has the key -23300 - k.
        weights: Its bytes in the `.bin`.
    """

    type: str
    name: str
    bottoms: list[str]
    tops: list[str]
    params: dict[int, str] = field(default_factory=dict)
    weights: bytes = b''

    def line(self) -> str:
        """The layer's line in the `.param`."""
        values = [f'{key}={value}' for key, value in self.params.items()]
        return ' '.join(
            [
                f'{self.type:<24} {self.name:<24}',
                str(len(self.bottoms)),
                str(len(self.tops)),
                *self.bottoms,
                *self.tops,
                *values,
            ]
        )


def parse_param(text: str) -> list[NcnnLayer]:
    """Reads the layers of a `.param`.

    Raises:
        PTQError: The text is no `.param`, or breaks off.
    """
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith(REMARK)]
    try:
        if lines[0] != [MAGIC] or int(lines[1][0]) != len(lines) - 2:
            raise ValueError
        return [_parse_layer(words) for words in lines[2:]]
    except (ValueError, IndexError):
        raise PTQError('the text is no ncnn .param file, or only a part of one.') from None


def _parse_layer(words: list[str]) -> NcnnLayer:
    first, second = int(words[2]), int(words[3])
    if min(first, second) < 0:
        raise ValueError
    blobs, params = words[4 : 4 + first + second], words[4 + first + second :]
    if len(blobs) != first + second:
        raise ValueError
    pairs = (word.split('=', 1) for word in params)
    return NcnnLayer(words[0], words[1], blobs[:first], blobs[first:], {int(key): value for key, value in pairs})


def param_text(layers: list[NcnnLayer], meta: dict) -> str:
    """The `.param` of some layers, in their order, and behind them what the file says about itself.

    ncnn reads as many lines as the second one tells, and nothing behind them.
    """
    blobs = sum(len(layer.tops) for layer in layers)
    lines = [MAGIC, f'{len(layers)} {blobs}', *(layer.line() for layer in layers), f'{REMARK} {json.dumps(meta)}']
    return '\n'.join(lines) + '\n'


def param_meta(text: str) -> dict | None:
    """What :func:`param_text` wrote behind the layers; None where there is nothing."""
    last = text.rstrip('\n').rpartition('\n')[2]
    if not last.startswith(REMARK):
        return None
    try:
        return json.loads(last.removeprefix(REMARK))
    except (RecursionError, ValueError):
        return None


def write_network(layers: list[NcnnLayer], folder: Path, meta: dict) -> Path:
    """Writes ``model.param`` and ``model.bin``; returns the path of the former.

    The .param goes first and comes last: it never lies beside the .bin of another network, or of half of one.
    """
    path = folder / 'model.param'
    meta = {**meta, 'weights': sum(len(layer.weights) for layer in layers)}
    remove(path)
    weights = b''.join(layer.weights for layer in layers)
    text = seal(param_text(layers, {**meta, CHECKSUM: BLANK}).encode(), weights).decode()
    write_atomic(path.with_suffix('.bin'), lambda file: file.write(weights))
    write_text(path, text)
    return path


def split_weights(layers: list[NcnnLayer], data: bytes) -> None:
    """Gives each layer its part of a `.bin`, in place: ncnn itself says how much a layer reads.

    Args:
        layers: The layers of the `.param`; opaque ones have no weights.
        data: The `.bin`.

    Raises:
        PTQError: The `.bin` is longer or shorter than the layers' weights.
    """
    import ncnn

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

    class Reader(ncnn.DataReader):
        def __init__(self) -> None:
            super().__init__()
            self.position = 0

        def read(self, buffer: object, size: int) -> int:
            part = data[self.position : self.position + size]
            ctypes.memmove(pointer(buffer, None), part, len(part))
            self.position += len(part)
            return len(part)

    reader = Reader()
    model = ncnn.ModelBinFromDataReader(reader)
    for layer in layers:
        loader = ncnn.create_layer(layer.type)
        # only shapes are told by expressions, and the binding does not take them
        if loader is None or any('"' in text for text in layer.params.values()):
            continue
        start = reader.position
        if loader.load_param(_param_dict(layer)) or loader.load_model(model):
            raise PTQError(f'ncnn cannot load the layer {layer.name} ({layer.type}) that pnnx wrote.')
        layer.weights = data[start : reader.position]
    if reader.position != len(data):
        raise PTQError(f'the layers that pnnx wrote read {reader.position} of {len(data)} bytes of weights.')


def _param_dict(layer: NcnnLayer) -> object:
    import ncnn

    params = ncnn.ParamDict()
    for key, text in layer.params.items():
        if key > -23300:
            params.set(key, _number(text))
            continue
        values = [_number(value) for value in text.split(',')[1:]]
        kind = np.float32 if any(isinstance(value, float) for value in values) else np.int32
        params.set(-23300 - key, ncnn.Mat(np.array(values, kind)).clone())
    return params


def _number(text: str) -> int | float:
    return float(text) if any(mark in text for mark in '.en') else int(text)


def array(*values: float) -> str:
    """The text of an array parameter."""
    return ','.join([str(len(values)), *(f'{value:.9e}' for value in values)])


def int8_weight(values: np.ndarray) -> bytes:
    """An int8 weight as the `.bin` holds it: tagged, and padded to 4 bytes."""
    return INT8_TAG + values.astype(np.int8).tobytes() + bytes(-values.size % 4)


def floats(values: object) -> bytes:
    """Untagged float32 numbers."""
    return np.ascontiguousarray(values, dtype=np.float32).tobytes()
