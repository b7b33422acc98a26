"""The embedded default data set, generated."""

from mmdet_ptq.datasets.embedded import EmbeddedDataset
from mmdet_ptq.datasets.generate import ensure_generated

__all__ = ['EmbeddedDataset', 'ensure_generated']
