"""Calibration images and their mirror images: twice as many for training, which is told by the float detector."""
from __future__ import annotations

from torch.utils.data import Dataset


class Mirrored(Dataset):
    """Every sample, then every sample with its image mirrored from left to right.

    Annotations are left as they are: this is for losses whose target the float detector gives.

    Args:
        samples: Samples as pipelines pack them, with ``inputs`` of shape (3, H, W).
    """

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples
        self.metainfo = getattr(samples, 'metainfo', {})

    def __len__(self) -> int:
        return 2 * len(self.samples)

    def __getitem__(self, position: int) -> dict:
        mirrored, index = divmod(position, len(self.samples))
        sample = self.samples[index]
        return {**sample, 'inputs': sample['inputs'].flip(-1)} if mirrored else sample
