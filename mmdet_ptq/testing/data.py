"""A tiny COCO on disk, and batches as a dataloader yields them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mmcv
import numpy as np
import torch

from mmdet_ptq.testing.models import NUM_CLASSES, SIZE

CLASSES = ('red', 'green', 'blue')


def tiny_coco(folder: str | os.PathLike, num_images: int = 8, seed: int = 0) -> dict[str, str]:
    """Writes images of coloured boxes on noise with their annotations, in COCO's layout.

    Args:
        folder: Gets ``train/``, ``val/`` and ``annotations/instances_{train,val}.json``.
        num_images: Images of each split. Defaults to 8.
        seed: Seed of the images; the splits differ. Defaults to 0.

    Returns:
        ``dict(train=..., val=...)``, the paths of the annotation files.
    """
    folder = Path(folder)
    (folder / 'annotations').mkdir(parents=True, exist_ok=True)
    paths = {}
    for part, split in enumerate(('train', 'val')):
        rng = np.random.default_rng([seed, part])
        images, annotations = [], []
        for number in range(num_images):
            image = rng.integers(0, 128, (SIZE, SIZE, 3), dtype=np.uint8)
            name = f'{number:06d}.png'
            for _ in range(rng.integers(1, 4)):
                category = int(rng.integers(NUM_CLASSES))
                w, h = (int(v) for v in rng.integers(10, SIZE // 2, 2))
                x, y = int(rng.integers(SIZE - w)), int(rng.integers(SIZE - h))
                image[y : y + h, x : x + w] = np.roll([40, 40, 230], -category)
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=number + 1,
                        category_id=category + 1,
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                    )
                )
            mmcv.imwrite(image, str(folder / split / name))
            images.append(dict(id=number + 1, file_name=name, width=SIZE, height=SIZE))
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
        path = folder / 'annotations' / f'instances_{split}.json'
        path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
        paths[split] = str(path)
    return paths


def tiny_batch(num_images: int = 2, seed: int = 0) -> dict:
    """A batch of random images, as mmdet's dataloaders yield it.

    Args:
        num_images: Images in the batch. Defaults to 2.
        seed: Seed of the images. Defaults to 0.

    Returns:
        ``dict(inputs=[uint8 tensors of (3, 64, 64)], data_samples=[DetDataSample])``.
    """
    from mmdet.structures import DetDataSample

    generator = torch.Generator().manual_seed(seed)
    # coarse blocks and fine noise: pure noise averages out in the deeper layers
    coarse = torch.randint(0, 200, (num_images, 3, 8, 8), generator=generator).repeat_interleave(SIZE // 8, 2)
    images = coarse.repeat_interleave(SIZE // 8, 3) + torch.randint(
        0, 56, (num_images, 3, SIZE, SIZE), generator=generator
    )
    meta = dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=dict(meta, img_id=i)) for i in range(num_images)]
    return dict(inputs=list(images.to(torch.uint8)), data_samples=samples)
