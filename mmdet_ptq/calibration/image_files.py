"""What image files and decoded images tell: whether files are whole, which are alike, what their pixels are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mmdet_ptq.errors import PTQError

# format to the bytes that whole files end with
_ENDS = dict(JPEG=b'\xff\xd9', PNG=b'IEND\xaeB`\x82')
_ORIENTATION = 274  # a tag of EXIF


class Glance(NamedTuple):
    """What an image file tells before it is decoded.

    Attributes:
        kind: Equal for files that a pipeline makes images of one size and one kind of pixels of.
        torn: Why the file holds less than its whole image; empty where it is whole.
    """

    kind: tuple
    torn: str


def glance(path: str | Path) -> Glance | None:
    """Looks at the head and the end of an image file.

    OpenCV 4 fills what is missing of a JPEG file with gray and says nothing.

    Args:
        path: The image file.

    Returns:
        None where Pillow cannot read the file; the pipeline may, or tells why not.
    """
    try:
        with Image.open(path) as image:
            # annotations give the size before or after the camera's rotation, or a wrong one; Pillow decodes a whole
            # PNG file to look for its tags
            rotation = image.info.get('exif') if image.format == 'PNG' else image.getexif().get(_ORIENTATION)
            kind = image.size, image.mode, rotation
            end = _ENDS.get(image.format)
    except Exception:  # whatever a damaged head leads to
        return None
    return Glance(kind, '' if end is None or _ends_with(Path(path), end) else _decoding_error(path))


def _ends_with(path: Path, end: bytes) -> bool:
    with path.open('rb') as file:
        file.seek(-len(end), 2)
        return file.read() == end


def _decoding_error(path: str | Path) -> str:
    """Why not all of an image can be decoded; what cameras append to their files is no damage."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # whatever a damaged file leads to
        return f'the file is damaged or cut short ({" ".join(str(error).split())})'
    return ''


def pixels(sample: Any) -> str | None:
    """Number of channels and type of numbers of what a test pipeline returns; None for what is no single image."""
    image = sample.get('inputs') if isinstance(sample, dict) else None
    if not isinstance(image, torch.Tensor) or image.dim() != 3:
        return None
    return f'{image.shape[0]} channels of {str(image.dtype).removeprefix("torch.")}'


def check_pixels(found: str | None, expected: str | None, image: str, first: str) -> None:
    """Refuses images whose pixels are others than those of the first: no batch holds both.

    Args:
        found: What :func:`pixels` tells of an image.
        expected: What it tells of the first one.
        image: Names the image, for the message.
        first: Path of the first image.

    Raises:
        PTQError: They differ.
    """
    if None not in (found, expected) and found != expected:
        raise PTQError(
            f'{image} has {found}, and {Path(first).name} {expected}; make the files alike, or set `color_type` of '
            "LoadImageFromFile in the test pipeline ('unchanged' keeps what a file has, 'color' gives 3 channels)."
        )
