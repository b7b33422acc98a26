"""Whether a detector still runs as the class of mmdet that it comes from."""

from __future__ import annotations

from torch import nn


def runs_as(detector: nn.Module, kind: type) -> bool:
    """Returns whether a detector is of a class of mmdet's and has that class's raw forward, not one of its own."""
    return isinstance(detector, kind) and type(detector)._forward is kind._forward
