"""The installed mmcv, however it was compiled: every function is there, and operators equal plain PyTorch."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
from mmcv import ops
from torch import Tensor
from torch.nn import functional

NAMES = Path(__file__).parent / 'helpers' / 'mmcv_functions.txt'


def test_every_function_is_there():
    extension = importlib.import_module('mmcv._ext')
    missing = [name for name in NAMES.read_text().split() if not callable(getattr(extension, name, None))]
    assert not missing


def boxes(count: int, size: float = 32) -> Tensor:
    corner = torch.rand(count, 2) * size
    return torch.cat([corner, corner + 2 + torch.rand(count, 2) * size / 2], 1)


def area(a: Tensor) -> Tensor:
    return (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (area(a)[:, None] + area(b)[None] - shared)


def suppressed(a: Tensor, scores: Tensor, threshold: float) -> list[int]:
    kept, iou = [], overlaps(a, a)
    for index in scores.argsort(descending=True).tolist():
        if all(iou[index, other] <= threshold for other in kept):
            kept.append(index)
    return kept


def turned(a: Tensor, quarters: Tensor) -> Tensor:
    """The same boxes as centre, width, height and angle, turned by quarters: width and height change places."""
    centre, size = (a[:, :2] + a[:, 2:]) / 2, a[:, 2:] - a[:, :2]
    size = torch.where(quarters[:, None] % 2 == 1, size.flip(1), size)
    return torch.cat([centre, size, quarters[:, None] * math.pi / 2], 1)


def corners(a: Tensor) -> Tensor:
    x1, y1, x2, y2 = a.unbind(1)
    return torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], 1)


def quarters(count: int) -> Tensor:
    return torch.randint(0, 4, (count,)).float()


def sampled(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear values of a (C, H, W) image at points, in pixels whose centres are whole numbers."""
    height, width = image.shape[1:]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    return functional.grid_sample(image[None], grid[None], align_corners=True, padding_mode='border')[0]


def averaged(image: Tensor, x1: float, y1: float, x2: float, y2: float, cells: int, samples: int) -> Tensor:
    """RoIAlign of one region."""
    steps = (torch.arange(cells * samples) + 0.5) / (cells * samples)
    y, x = torch.meshgrid(y1 + steps * (y2 - y1), x1 + steps * (x2 - x1), indexing='ij')
    return functional.avg_pool2d(sampled(image, x, y)[None], samples)[0]


REGION = (3.0, 4.0, 17.0, 13.0)


def nms():
    a, scores = boxes(40), torch.rand(40)
    return ops.nms(a, scores, 0.4)[1], torch.tensor(suppressed(a, scores, 0.4))


def soft_nms():
    """The naive kind of soft NMS is NMS, told by the scores."""
    a, scores = boxes(20), torch.rand(20) + 0.01
    found, kept = ops.soft_nms(a, scores, 0.3, min_score=1e-3, method='naive')
    expected = suppressed(a, scores, 0.3)
    return torch.cat([kept[:, None], found], 1), torch.cat(
        [torch.tensor(expected)[:, None], a[expected], scores[expected][:, None]], 1
    )


def nms_rotated():
    a, scores = boxes(40), torch.rand(40)
    return ops.nms_rotated(turned(a, quarters(40)), scores, 0.4)[1], torch.tensor(suppressed(a, scores, 0.4))


def nms_quadri():
    a, scores = boxes(40), torch.rand(40)
    return ops.nms_quadri(corners(a), scores, 0.4)[1], torch.tensor(suppressed(a, scores, 0.4))


def bbox_overlaps():
    a, b = boxes(12), boxes(9)
    return ops.bbox_overlaps(a, b), overlaps(a, b)


def box_iou_rotated():
    a, b = boxes(12), boxes(9)
    return ops.box_iou_rotated(turned(a, quarters(12)), turned(b, quarters(9))), overlaps(a, b)


def box_iou_quadri():
    a, b = boxes(12), boxes(9)
    return ops.box_iou_quadri(corners(a), corners(b)), overlaps(a, b)


def roi_align():
    image, (x1, y1, x2, y2) = torch.randn(1, 4, 20, 24), REGION
    found = ops.roi_align(image, torch.tensor([[0, x1, y1, x2, y2]]), (4, 4), 1.0, 2, 'avg', True)
    return found[0], averaged(image[0], x1 - 0.5, y1 - 0.5, x2 - 0.5, y2 - 0.5, 4, 2)


def roi_align_rotated():
    """A region that is turned by half a circle is the region, upside down."""
    image, (x1, y1, x2, y2) = torch.randn(1, 4, 20, 24), REGION
    region = torch.tensor([[0, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, math.pi]])
    found = ops.roi_align_rotated(image, region, (4, 4), 1.0, 2, True)
    return found[0], averaged(image[0], x1 - 0.5, y1 - 0.5, x2 - 0.5, y2 - 0.5, 4, 2).flip(1, 2)


def deform_conv():
    """The same offset everywhere is a convolution of the image sampled there."""
    image, weight = torch.randn(1, 4, 12, 12), torch.randn(5, 4, 3, 3)
    offset = torch.tensor([0.25, 0.5]).repeat(9)[None, :, None, None].expand(1, 18, 10, 10).contiguous()
    y, x = torch.meshgrid(torch.arange(11) + 0.25, torch.arange(11) + 0.5, indexing='ij')
    moved = sampled(image[0], x, y)[None]
    found = ops.deform_conv2d(image, offset, weight)
    return found[..., :9, :9], functional.conv2d(moved, weight)


def modulated_deform_conv():
    image, weight, bias = torch.randn(1, 4, 12, 12), torch.randn(5, 4, 3, 3), torch.randn(5)
    mask = torch.rand(1, 9, 10, 10)
    columns = functional.unfold(image, 3).reshape(1, 4, 9, 10, 10) * mask[:, None]
    expected = torch.einsum('ock,ckhw->ohw', weight.flatten(2), columns[0]) + bias[:, None, None]
    return ops.modulated_deform_conv2d(image, torch.zeros(1, 18, 10, 10), mask, weight, bias, 1, 0)[0], expected


def psa_mask():
    """Collecting: pixel (i, j) weighs pixel (k, l) by the channel of their distance."""
    size, half = 5, 4
    given = torch.randn(1, (2 * half + 1) ** 2, size, size)
    expected = torch.zeros(1, size * size, size, size)
    for i in range(size):
        for j in range(size):
            for k in range(size):
                for m in range(size):
                    channel = (k - i + half) * (2 * half + 1) + m - j + half
                    expected[0, k * size + m, i, j] = given[0, channel, i, j]
    return ops.PSAMask('collect', (2 * half + 1, 2 * half + 1))(given), expected


def rotated_feature_align():
    """One point a box: the value at its centre is added."""
    image, centre = torch.randn(1, 3, 6, 6), torch.rand(6, 6, 2) * 4 + 0.5
    regions = torch.cat([centre, torch.ones(6, 6, 2), torch.zeros(6, 6, 1)], -1)[None]
    found = ops.rotated_feature_align(image, regions, spatial_scale=1.0, points=1)
    # boxes are y, x here
    return found[0], image[0] + sampled(image[0], centre[..., 1], centre[..., 0])


def points_in_boxes():
    points = torch.rand(1, 50, 3) * 4 - 2
    inside = (points[0].abs() < torch.tensor([0.5, 1.0, 1.5])).all(1)
    found = ops.points_in_boxes_cpu(points, torch.tensor([[[0.0, 0.0, -1.5, 1.0, 2.0, 3.0, 0.0]]]))
    return found[0, :, 0].bool(), inside


def voxelization():
    points = torch.rand(30, 3) * 4
    cells = ops.Voxelization([0.5, 1.0, 2.0], [0, 0, 0, 4, 4, 4], max_num_points=-1)(points)
    return cells, (points / torch.tensor([0.5, 1.0, 2.0])).floor().int().flip(1)


OPERATORS = (
    nms,
    soft_nms,
    nms_rotated,
    nms_quadri,
    bbox_overlaps,
    box_iou_rotated,
    box_iou_quadri,
    roi_align,
    roi_align_rotated,
    deform_conv,
    modulated_deform_conv,
    psa_mask,
    rotated_feature_align,
    points_in_boxes,
    voxelization,
)


@pytest.mark.parametrize('operator', OPERATORS, ids=lambda operator: operator.__name__)
def test_an_operator_equals_plain_pytorch(operator):
    found, expected = operator()
    assert found.numel() and torch.allclose(found.double(), expected.double(), atol=1e-4), (found, expected)
