"""Annotation files in COCO's format: what is missing or damaged is named before anything reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmdet_ptq.errors import PTQError

_TEXTS = ('file_name', 'coco_url', 'name')
_NUMBERS = ('width', 'height', 'area')
# what is needed of each entry, by who needs it
_BOXES = dict(annotations=('id', 'image_id', 'category_id', 'bbox', 'area'), categories=('id', 'name'))
TO_LOAD_IMAGES = dict(images=('id', 'file_name'))
TO_LOAD = dict(images=('id', 'file_name', 'width', 'height'), **_BOXES)
TO_LOAD_LVIS = {**TO_LOAD, 'images': ('id', 'coco_url', 'width', 'height')}
TO_EVALUATE = dict(images=('id',), **{**_BOXES, 'annotations': (*_BOXES['annotations'], 'iscrowd')})


def check_annotation_file(path: str | Path, key: str, needed: Mapping[str, Iterable[str]]) -> None:
    """Reads an annotation file and checks it, see :func:`check_annotations`.

    Args:
        path: The file.
        key: Where the config names it.
        needed: One of :data:`TO_LOAD`, :data:`TO_EVALUATE`, ...
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without an end
        raise PTQError(no_json(f'`{key}`: the annotation file {str(path)!r}', error)) from error
    check_annotations(content, f'`{key}`: the annotation file {str(path)!r}', needed)


def no_json(what: str, error: Exception) -> str:
    """The sentence for a file that is no JSON.

    Args:
        what: Names the file.
        error: What its reader said.
    """
    # what some editors begin a file with, and no reader of JSON takes
    fix = ' Save it as UTF-8 without a byte order mark (BOM).' if 'BOM' in str(error) else ''
    return f'{what} is no valid JSON ({error}).{fix}'


def check_annotations(content: Any, what: str, needed: Mapping[str, Iterable[str]]) -> None:
    """Checks that the entries of an annotation file have what is needed.

    Args:
        content: The parsed file.
        what: Names the file, for the message.
        needed: List of the file to the fields of each of its entries.

    Raises:
        PTQError: A list, a field or an id is missing or there twice, or a box is none.
    """
    for part, fields in needed.items():
        entries = content.get(part) if isinstance(content, Mapping) else None
        if not isinstance(entries, list):
            raise PTQError(f'{what} has no list `{part}`; is it in the format of COCO?')
        seen = set()
        for place, entry in enumerate(entries):
            if not isinstance(entry, Mapping):
                raise PTQError(f'{what}: `{part}[{place}]` is no dict.')
            named = f'{what}: `{part}` with the id {entry["id"]!r}' if 'id' in entry else f'{what}: `{part}[{place}]`'
            for field in fields:
                if entry.get(field) is None:
                    lvis = field == 'file_name' and 'coco_url' in entry
                    fix = "it is in the format of LVIS, which type='LVISV1Dataset' reads" if lvis else 'add it'
                    raise PTQError(f'{named} has no `{field}`; {fix}.')
                if field in _TEXTS and not isinstance(entry[field], str):
                    raise PTQError(f'{named} has the `{field}` {entry[field]!r:.60}, which is no text.')
                if field in _NUMBERS and not is_number(entry[field]):
                    raise PTQError(f'{named} has the `{field}` {_shown(entry[field])}, which is no finite number.')
                if field == 'iscrowd' and entry[field] not in (0, 1):
                    raise PTQError(f'{named} has the `iscrowd` {_shown(entry[field])}, which is neither 0 nor 1.')
            if not _is_id(entry['id']):
                raise PTQError(f'{named:.200} has an `id` that is no number and no text.')
            if entry['id'] in seen:
                raise PTQError(f'{named} is there twice; give each entry an id of its own.')
            seen.add(entry['id'])
            if 'bbox' in fields and not is_box(entry['bbox']):
                raise PTQError(f'{named} has the `bbox` {_shown(entry["bbox"])}, which is not four finite numbers.')


def _shown(value: Any) -> str:
    try:
        return f'{value!r:.60}'
    except ValueError:  # Python writes no number of thousands of digits
        return 'of too many digits'


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond what floats hold
        return False


def is_box(value: Any) -> bool:
    """Whether a value is a box: x, y, width, height."""
    return isinstance(value, list | tuple) and len(value) == 4 and all(map(is_number, value))


def complete(content: Any, what: str) -> None:
    """Fills in, in place, what reading images does not need; boxes that are none are left out.

    Args:
        content: The parsed file.
        what: Names the file, for the message.

    Raises:
        PTQError: It names no images.
    """
    check_annotations(content, what, TO_LOAD_IMAGES)
    for image in content['images']:
        for side in ('width', 'height'):
            image[side] = image[side] if is_number(image.get(side)) else 0
    boxes = [
        box
        for box in _dicts(content.get('annotations'))
        if _is_id(box.get('image_id')) and _is_id(box.get('category_id')) and is_box(box.get('bbox'))
    ]
    for place, box in enumerate(boxes):
        box['area'] = box['area'] if is_number(box.get('area')) else box['bbox'][2] * box['bbox'][3]
        box['id'] = box['id'] if _is_id(box.get('id')) else f'box {place}'
    content['annotations'] = list({box['id']: box for box in boxes}.values())
    content['categories'] = [c for c in _dicts(content.get('categories')) if _is_id(c.get('id')) and 'name' in c]


def _dicts(value: Any) -> list[dict]:
    """The dicts in a list, if it is one."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float | str)
