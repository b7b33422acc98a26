"""Data samples that every detector's raw forward takes."""

from __future__ import annotations

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData


def with_annotations(samples: list[DetDataSample]) -> list[DetDataSample]:
    """The same samples, with empty annotations where there are none: some heads ask for them and use none.

    Args:
        samples: They are not changed.
    """
    return [sample if 'gt_instances' in sample else _with_none(sample) for sample in samples]


def _with_none(sample: DetDataSample) -> DetDataSample:
    sample = sample.new()  # a plain copy would share the names of its fields
    sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample
