"""The embedded data set as mmdet sees it: a ``CocoDataset`` that generates itself on first use."""

from __future__ import annotations

from mmdet.datasets import CocoDataset

from mmdet_ptq.datasets.generate import NUM_IMAGES, ensure_generated
from mmdet_ptq.datasets.shapes import CLASSES
from mmdet_ptq.registry import DATASETS


@DATASETS.register_module()
class EmbeddedDataset(CocoDataset):
    """Generated detection data: textured shapes that occlude each other on varied backgrounds, in COCO layout.

    The images are generated under ``data_root`` when they are not there yet, always the same ones for the same seed,
    and left alone afterwards.

    Args:
        data_root: Folder of the data set, relative to the working directory. Defaults to 'data/embedded'.
        ann_file: Defaults to 'annotations/instances_train.json'; the other one is 'instances_val.json'.
        data_prefix: Defaults to ``dict(img='train/')``; the other one is 'val/'.
        num_images: Images of each split. Data sets that share a ``data_root`` must agree on it.
            Defaults to ``dict(train=1600, val=250)``.
        seed: Seed of the generator, independent of the run's. Defaults to 0.
        **kwargs: Further arguments of ``mmdet.datasets.CocoDataset``.
    """

    METAINFO = {
        'classes': CLASSES,
        'palette': [(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180)],
    }

    def __init__(
        self,
        data_root: str = 'data/embedded',
        ann_file: str = 'annotations/instances_train.json',
        data_prefix: dict | None = None,
        num_images: dict[str, int] = NUM_IMAGES,
        seed: int = 0,
        **kwargs,
    ) -> None:
        ensure_generated(data_root, num_images, seed)
        super().__init__(
            data_root=data_root, ann_file=ann_file, data_prefix=data_prefix or dict(img='train/'), **kwargs
        )
