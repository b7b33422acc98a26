"""Which end-to-end graph a detector has, if it has one."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmdet_ptq.deploy.network.parts import has_regions
from mmdet_ptq.deploy.onnx.end2end.one_stage import OneStage, one_stage_trouble
from mmdet_ptq.deploy.onnx.end2end.two_stage import TwoStages, two_stage_trouble
from mmdet_ptq.errors import PTQError

# what an end-to-end graph reads
INPUTS = ['input', 'size']


def end_to_end(detector: nn.Module, outputs: Any) -> nn.Module:
    """The network of such a graph; ``names`` are those of its outputs.

    Args:
        detector: The detector, float or quantized, in eval mode.
        outputs: What its first network returns for an image tensor.

    Raises:
        PTQError: See :func:`check_end2end`.
    """
    check_end2end(detector)
    return (TwoStages if has_regions(detector) else OneStage)(detector, outputs)


def check_end2end(detector: nn.Module) -> None:
    """Refuses detectors whose decoding or suppression the exported graph could not repeat.

    Args:
        detector: A detector that :func:`mmdet_ptq.deploy.network.raw_outputs.check_exportable` accepts.

    Raises:
        PTQError: Its head decodes in a way of its own, or its NMS is not the plain one; names the head.
    """
    if trouble := end2end_trouble(detector):
        raise PTQError(f'--end2end: {trouble}; export without --end2end.')


def end2end_trouble(detector: nn.Module) -> str:
    """Why the decoding or the suppression of a detector has no place in its graph; '' if it has."""
    return (two_stage_trouble if has_regions(detector) else one_stage_trouble)(detector)
