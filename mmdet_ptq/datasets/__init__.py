"""The embedded default data set, generated."""
from .embedded import EmbeddedDataset
from .generate import ensure_generated

__all__ = ['EmbeddedDataset', 'ensure_generated']
