"""Versions of the calibration images for training: more images where the float detector tells the targets."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

SMALLEST_CROP = 0.5  # of the image's sides


class Augmented(Dataset):
    """Every sample in several versions: the image, its mirror image, then random parts of both, enlarged.

    A version is the same whenever it is asked for, so that a run that was interrupted goes on with the same images.
    Annotations are left as they are: this is for losses whose target the float detector gives.

    Args:
        samples: Samples as pipelines pack them, with ``inputs`` of shape (C, H, W).
        versions: Versions of each; 1: the samples as they are, 2: mirror images, too.
        seed: Of the random parts.
    """

    def __init__(self, samples: Dataset, versions: int, seed: int) -> None:
        self.samples, self.versions, self.seed = samples, versions, seed
        self.metainfo = getattr(samples, 'metainfo', {})

    def __len__(self) -> int:
        return self.versions * len(self.samples)

    def __getitem__(self, position: int) -> dict:
        version, index = divmod(position, len(self.samples))
        sample = self.samples[index]
        image = sample['inputs'].flip(-1) if version % 2 else sample['inputs']
        if version > 1:
            image = _enlarged_part(image, np.random.default_rng((self.seed, version, index)))
        return {**sample, 'inputs': image}


def _enlarged_part(image: Tensor, random: np.random.Generator) -> Tensor:
    """A random part of an image, (C, H, W), of the same proportions, in the image's size."""
    size = image.shape[-2:]
    share = random.uniform(SMALLEST_CROP, 1)
    height, width = (max(round(share * side), 1) for side in size)
    top, left = (int(random.integers(full - part + 1)) for full, part in zip(size, (height, width), strict=True))
    part = image[:, top : top + height, left : left + width]
    out = F.interpolate(part[None].float(), size, mode='bilinear')[0]
    return (out if image.is_floating_point() else out.round()).to(image.dtype)
