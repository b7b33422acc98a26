"""A program that detects with an end-to-end model and knows nothing of mmdet: written from the test pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import mmcv.transforms
from mmdet.datasets import transforms
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import TRANSFORMS
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.version import __version__

PROGRAM = 'detect.py'
_READING = {
    'color': 'cv2.IMREAD_COLOR',
    'grayscale': 'cv2.IMREAD_GRAYSCALE',
    'unchanged': 'cv2.IMREAD_UNCHANGED',
    'color_ignore_orientation': 'cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION',
    'grayscale_ignore_orientation': 'cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION',
}
_INTERPOLATION = dict(nearest='NEAREST', bilinear='LINEAR', bicubic='CUBIC', area='AREA', lanczos='LANCZOS4')
_TEXT = Template('''\
"""Detects the objects in an image, without mmdet: python detect.py IMAGE

Needs $package, NumPy and OpenCV. Written by mmdet-ptq $version; it reads images as the config's test pipeline does.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import $package

MODEL = Path(__file__).parent / $model
CLASSES = $classes
HEIGHT, WIDTH = $size  # of the tensor that the model takes


def load(path):
    """The model as a function: the tensor and the image's size in it; $values out."""
    $opens
    return lambda tensor, size: $runs


def prepare(image):
    """The tensor that the model takes, height and width of the image in it, the factors by which x and y grew."""
    scale = 1.0, 1.0
$steps
    if image.shape[0] > HEIGHT or image.shape[1] > WIDTH:
        raise SystemExit(
            f'the image is resized to {image.shape[0]}x{image.shape[1]} (height x width), and the model takes '
            f'{HEIGHT}x{WIDTH}; export it with a larger `ptq.export_size`'
        )
    # what the image does not fill
    tensor = np.full((1, image.shape[2], HEIGHT, WIDTH), $pad_value, np.float32)
    tensor[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return tensor, np.float32([image.shape[:2]]), scale


def detect(run, image, threshold):
    """Boxes as x1, y1, x2, y2 in pixels of the image, scores and labels$also, best first."""
    tensor, size, (x, y) = prepare(image)
    $values = (found[0] for found in run(tensor, size))
    height, width = image.shape[:2]
    whole = boxes / np.float32([x, y, x, y])
    boxes = whole.clip(0, [width, height, width, height])
    # places without a detection have the label -1; what lies in the padding has no box in the image
    kept = (labels >= 0) & (scores >= threshold) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[kept], scores[kept], labels[kept]$pasted

$paste
def main():
    parser = argparse.ArgumentParser(description='Detects the objects in an image.')
    parser.add_argument('image', help='image file')
    parser.add_argument('--threshold', type=float, default=0.3, help='smallest score that is shown (default 0.3)')
    parser.add_argument('--out', default='detections.png', help='gets the image with its boxes (default %(default)s)')
    parser.add_argument('--model', default=str(MODEL), help='another end-to-end model')
    args = parser.parse_args()
    image, drawn = cv2.imread(args.image, $reading), cv2.imread(args.image, $drawing)
    if image is None:
        parser.error(f'{args.image} is missing, or no image that OpenCV reads')
    if (image.shape[2] if image.ndim == 3 else 1) != $channels:
        parser.error(f'{args.image} has the shape {image.shape}, and the model takes $channels channels')
    for box, score, label$mask in zip(*detect(load(args.model), image, args.threshold)):
        name = CLASSES[label] if label < len(CLASSES) else str(label)
        print(name, f'{score:.3f}', *(f'{side:.2f}' for side in box))
        color = tuple(int(value) for value in np.random.default_rng(int(label)).integers(0, 256, 3))
$paint        left, top, right, bottom = (int(side) for side in box.round())
        cv2.rectangle(drawn, (left, top), (right, bottom), color, 2)
        cv2.putText(drawn, f'{name} {score:.2f}', (left, max(top - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color)
    cv2.imwrite(args.out, drawn)


if __name__ == '__main__':
    main()
''')

# what the program of a detector with masks has besides
_MASKS = dict(
    values='boxes, scores, labels, masks',
    also=', and masks of its size',
    pasted=', [\n        paste(*found, height, width) for found in zip(masks[kept], whole[kept])\n    ]',
    mask=', mask',
    paint='        drawn[mask] = drawn[mask] // 2 + np.uint8(color) // 2\n',
)
_PASTE = Template('''
def paste(mask, box, height, width):
    """What of the image a mask covers, which is a grid over its box."""
    x, y = (np.arange(side, dtype=np.float32) + 0.5 for side in (width, height))
    columns = (x - box[0]) / (box[2] - box[0]) * mask.shape[1] - 0.5
    rows = (y - box[1]) / (box[3] - box[1]) * mask.shape[0] - 0.5
    return cv2.remap(mask, *np.float32(np.meshgrid(columns, rows)), cv2.INTER_LINEAR) >= $threshold

''')


@dataclass(frozen=True)
class Opening:
    """How a program opens and runs a model in one runtime.

    Attributes:
        package: What it imports.
        opens: Statement that opens the model at ``path``.
        runs: Expression whose value are the outputs for ``tensor`` and ``size``, in their order.
    """

    package: str
    opens: str
    runs: str


def detection_program(
    pipeline: Sequence[Mapping],
    detector: nn.Module,
    shape: Sequence[int],
    opening: Opening,
    model: str,
    classes: Sequence[str],
) -> str:
    """The text of a program that reads an image as mmdet does, runs an end-to-end model and draws what it finds.

    Args:
        pipeline: The config's test pipeline.
        detector: The detector, with mmdet's data preprocessor.
        shape: Shape of the model's input.
        opening: Of the runtime.
        model: Where the model lies, seen from the program.
        classes: Names of the labels.

    Raises:
        PTQError: The pipeline or the preprocessor has a step that the program does not know; names it.
    """
    preprocessor = detector.data_preprocessor
    if type(preprocessor) is not DetDataPreprocessor:
        raise PTQError(f'the data preprocessor {type(preprocessor).__name__} is unknown')
    reader, *steps = [step for step in map(_built, pipeline) if type(step) not in _PASSED]
    if type(reader) not in _READERS or any(type(step) in _READERS for step in steps):
        raise PTQError(f'the test pipeline reads its image by {type(reader).__name__}, which is unknown')
    if reader.imdecode_backend != 'cv2' or reader.color_type not in _READING:
        raise PTQError(
            f"the test pipeline reads its image by {reader.imdecode_backend!r} as {reader.color_type!r}; known is 'cv2'"
        )
    if sum(type(step) in _RESIZING for step in steps) > 1:
        raise PTQError('the test pipeline resizes its image more than once')
    lines = ['image = image.astype(np.float32)'] if reader.to_float32 else []
    for step in steps:
        lines += _WRITERS[type(step)](step)
    ignoring = ' | cv2.IMREAD_IGNORE_ORIENTATION'
    upright = reader.color_type in ('color', 'grayscale')
    return _TEXT.substitute(
        package=opening.package,
        version=__version__,
        model=repr(model),
        classes=repr([str(name) for name in classes]),
        size=f'{int(shape[2])}, {int(shape[3])}',
        opens=opening.opens,
        runs=opening.runs,
        steps='\n'.join(f'    {line}' for line in [*lines, *_normalization(preprocessor, int(shape[1]))]),
        **_of_masks(detector),
        channels=int(shape[1]),
        pad_value=float(preprocessor.pad_value),
        reading=_READING[reader.color_type],
        drawing='cv2.IMREAD_COLOR' + ('' if upright else ignoring),
    )


def _of_masks(detector: nn.Module) -> dict[str, str]:
    """What the text has of masks."""
    if not detector.with_mask:
        return dict.fromkeys(('also', 'pasted', 'mask', 'paint', 'paste'), '') | dict(values='boxes, scores, labels')
    return dict(_MASKS, paste=_PASTE.substitute(threshold=float(detector.roi_head.test_cfg['mask_thr_binary'])))


def _built(step: Mapping) -> Any:
    """One step of the pipeline as an object, which knows its defaults."""
    kind = step['type']
    if isinstance(kind, str):
        scope, _, name = kind.rpartition('.')
        # a name that is unknown is not looked up: that could import what it names
        known = scope in ('', 'mmdet', 'mmcv') and name in {known.__name__ for known in _KNOWN}
        kind = TRANSFORMS.get(kind) if known else kind
    if kind not in _KNOWN:
        raise PTQError(f'the test pipeline has {getattr(kind, "__name__", kind)!s:.100}, which is unknown')
    return kind(**{key: value for key, value in step.items() if key != 'type'})


def _resize(step: Any) -> list[str]:
    if step.backend != 'cv2' or step.interpolation not in _INTERPOLATION:
        raise PTQError(f'the test pipeline resizes by {step.backend!r}, {step.interpolation!r}, which is unknown')
    width, height = step.scale or map(float, step.scale_factor)
    if step.scale is not None and {type(width), type(height)} != {int}:
        raise PTQError(f'the test pipeline resizes to {step.scale}, which are no whole numbers')
    lines = ['height, width = image.shape[:2]']
    if step.scale is None:
        lines.append(f'size = int(width * {width} + 0.5), int(height * {height} + 0.5)')
    elif not step.keep_ratio:
        lines.append(f'size = {width}, {height}')
    longer, shorter = ('max(size)', 'min(size)') if step.scale is None else (max(width, height), min(width, height))
    if step.keep_ratio:
        lines += [
            f'factor = min({longer} / max(height, width), {shorter} / min(height, width))',
            'size = int(width * factor + 0.5), int(height * factor + 0.5)',
        ]
    return [
        *lines,
        f'image = cv2.resize(image, size, interpolation=cv2.INTER_{_INTERPOLATION[step.interpolation]})',
        'scale = size[0] / width, size[1] / height',
    ]


def _pad(step: Any) -> list[str]:
    if step.padding_mode != 'constant':
        raise PTQError(f'the test pipeline pads by {step.padding_mode!r}, which is unknown')
    value = step.pad_val.get('img', 0)
    value = [float(side) for side in value] if isinstance(value, Sequence) else float(value)
    lines, size = ['height, width = image.shape[:2]'], 'height, width'
    if step.pad_to_square:
        size = 'max(height, width), max(height, width)'
    elif step.size is not None:
        size = f'max({int(step.size[1])}, height), max({int(step.size[0])}, width)'
    lines.append(f'rows, columns = {size}')
    if step.size_divisor is not None:
        divisor = int(step.size_divisor)
        lines.append(f'rows, columns = -(-rows // {divisor}) * {divisor}, -(-columns // {divisor}) * {divisor}')
    return [
        *lines,
        f'padded = np.full((rows, columns, *image.shape[2:]), {value}, image.dtype)',
        'padded[:height, :width] = image',
        'image = padded',
    ]


def _normalization(preprocessor: nn.Module, channels: int) -> list[str]:
    lines = [f'image = image.reshape(*image.shape[:2], {channels}).astype(np.float32)']
    if preprocessor._channel_conversion and channels == 3:
        lines.append('image = image[..., ::-1]  # BGR to RGB')
    if preprocessor._enable_normalize:
        # as they stand in the config: the shortest numbers that round to these
        mean, std = (
            [float(str(value)) for value in values.flatten().cpu().numpy()]
            for values in (preprocessor.mean, preprocessor.std)
        )
        lines.append(f'image = (image - np.float32({mean})) / np.float32({std})')
    return lines


_READERS = (mmcv.transforms.LoadImageFromFile,)
# what does nothing to the image
_PASSED = (mmcv.transforms.LoadAnnotations, transforms.LoadAnnotations, transforms.PackDetInputs)
_RESIZING = (mmcv.transforms.Resize, transforms.Resize)
_WRITERS: dict[type, Callable[[Any], list[str]]] = {
    **dict.fromkeys(_RESIZING, _resize),
    **dict.fromkeys((mmcv.transforms.Pad, transforms.Pad), _pad),
}
_KNOWN = (*_READERS, *_PASSED, *_WRITERS)
