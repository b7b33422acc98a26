"""Writes the embedded data set to disk in COCO layout, whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np
from mmengine.logging import print_log
from pycocotools import mask as rle

from mmdet_ptq.datasets.scenes import make_scene
from mmdet_ptq.datasets.shapes import CLASSES
from mmdet_ptq.errors import PTQError
from mmdet_ptq.progress import track

# raise it whenever an image or an annotation changes: data of another version are generated anew
GENERATOR_VERSION = 2
SPLITS = ('train', 'val')  # the position is the number of the split's random stream
NUM_IMAGES: Mapping[str, int] = MappingProxyType(dict(train=1600, val=250))
ID_OFFSET = 1_000_000  # between the image ids of two splits, so that no id occurs in both
STAMP = 'embedded.json'
_STALE_SECONDS = 3600


def ensure_generated(data_root: str | Path, num_images: Mapping[str, int] = NUM_IMAGES, seed: int = 0) -> Path:
    """Generates the data set unless the folder already holds exactly this one.

    The files are written to a temporary folder beside ``data_root``, which is renamed at the end. So an interrupted
    generation leaves nothing that looks complete, and several processes may call this at the same time.

    Args:
        data_root: Folder of the data set.
        num_images: Images of each split. Defaults to 1600 for 'train', 250 for 'val'.
        seed: Seed of the generator. Defaults to 0.

    Returns:
        ``data_root``.

    Raises:
        PTQError: ``num_images`` does not fit, the folder holds something else, or it cannot be written.
    """
    root = Path(data_root)
    if set(num_images) != set(SPLITS) or any(n < 1 or n > ID_OFFSET for n in num_images.values()):
        raise PTQError(
            f'num_images of the embedded data set needs a positive number for each of {SPLITS}, got {dict(num_images)}.'
        )
    stamp = dict(version=GENERATOR_VERSION, seed=seed, num_images={split: num_images[split] for split in SPLITS})
    if _read_stamp(root) == stamp:
        return root
    if root.exists() and _read_stamp(root) is None and (not root.is_dir() or any(root.iterdir())):
        raise PTQError(
            f"data_root '{root}' holds files that are not the embedded data set; "
            'name another data_root or move them away.'
        )

    print_log(
        f"Generating {sum(num_images.values())} images in '{root}' (once, about half a minute).", logger='current'
    )
    partial = root.parent / f'.{root.name}-{uuid.uuid4().hex}.partial'
    try:
        partial.mkdir(parents=True)
        tasks = [(split, index) for split in SPLITS for index in range(num_images[split])]
        _write(partial, tasks, seed)
        (partial / STAMP).write_text(json.dumps(stamp))
        _put_in_place(partial, root, stamp)
    except OSError as error:
        raise PTQError(
            f"Cannot write the embedded data set to '{root}' ({error}); "
            'free some space (it needs 300 MB) or name another data_root.'
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_stale(root)
    return root


def _read_stamp(root: Path) -> dict | None:
    try:
        return json.loads((root / STAMP).read_text())
    except (OSError, ValueError):
        return None


def _write(root: Path, tasks: list[tuple[str, int]], seed: int) -> None:
    """Writes images and annotations of the listed (split, index)."""
    categories = [dict(id=label + 1, name=name, supercategory='shape') for label, name in enumerate(CLASSES)]
    coco = {split: dict(images=[], annotations=[], categories=categories) for split in SPLITS}
    for split in SPLITS:
        (root / split).mkdir()
    for split, index in track(tasks, 'drawing images'):
        stream = SPLITS.index(split)
        scene = make_scene(seed, stream, index)
        name, image_id = f'{index:06d}.png', stream * ID_OFFSET + index + 1
        # run-length strategy: as small as the default one here, in two thirds of the time
        encoded = cv2.imencode(
            '.png',
            scene.image,
            [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE],
        )[1]
        (root / split / name).write_bytes(encoded.tobytes())
        height, width = scene.image.shape[:2]
        coco[split]['images'].append(dict(id=image_id, file_name=name, height=height, width=width))
        annotations = coco[split]['annotations']
        for placement, (x1, y1, x2, y2), mask in zip(scene.placements, scene.boxes.tolist(), scene.masks, strict=True):
            runs = rle.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                dict(
                    id=10 * stream * ID_OFFSET + len(annotations) + 1,
                    image_id=image_id,
                    category_id=placement.label + 1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=int(mask.sum()),
                    segmentation=dict(size=runs['size'], counts=runs['counts'].decode('ascii')),
                    iscrowd=0,
                )
            )
    (root / 'annotations').mkdir()
    for split in SPLITS:
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco[split]))


def _put_in_place(partial: Path, root: Path, stamp: dict) -> None:
    """Renames the finished folder; a data set of another version steps aside, one of another process stays."""
    if root.exists() and _read_stamp(root) != stamp:
        aside = partial.with_name(partial.name + '-old')
        root.replace(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        partial.replace(root)
    except OSError:
        if _read_stamp(root) != stamp:  # not a faster process that generated the same
            raise


def _remove_stale(root: Path) -> None:
    """Removes what a killed process left behind."""
    for folder in root.parent.glob(f'.{root.name}-*.partial*'):
        try:
            stale = time.time() - folder.stat().st_mtime > _STALE_SECONDS
        except OSError:  # another process has just finished with it
            continue
        if stale:
            shutil.rmtree(folder, ignore_errors=True)
