"""Sizes of feature maps in tensors, whose values the exporter reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdet_ptq.deploy.network.known_sizes import known_sizes


class Maps(nn.Module):
    """As deformable transformers do: sizes of maps in a tensor, and what is computed and shaped by them."""

    def forward(self, first, second):
        maps = (first, second)
        sizes = torch.stack([torch._shape_as_tensor(m)[2:].to(m.device) for m in maps])
        starts = torch.cat((sizes.new_zeros((1,)), sizes.prod(1).cumsum(0)[:-1]))
        rows = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        split = rows.split([int(h * w) for h, w in sizes], dim=1)
        grids = [
            torch.cartesian_prod(torch.linspace(0.5, float(h) - 0.5, int(h)), torch.arange(int(w)).float())
            for h, w in sizes
        ]
        normalised = [grid / sizes[level].float() for level, grid in enumerate(grids)]
        images = [
            part.transpose(1, 2).reshape(len(part), -1, *sizes[level].tolist()) for level, part in enumerate(split)
        ]
        # beside a tensor that is traced, sizes are constants
        return *images, *normalised, rows[:, starts], rows.mean(1) * sizes[0].flip(0).prod(), first[..., 0] + starts[1]


@pytest.fixture
def maps():
    return torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 3)


def test_values_are_the_same_as_without(maps):
    expected = Maps()(*maps)
    with known_sizes():
        found = Maps()(*maps)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.equal(theirs)


def test_what_is_shaped_by_them_can_be_traced(maps):
    expected = Maps()(*maps)
    with known_sizes():
        program = torch.export.export(Maps(), maps, strict=False)
    found = program.module()(*maps)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    # no symbol stands for a size
    assert not program.range_constraints


def test_without_them_nothing_is_traced(maps):
    with pytest.raises(Exception, match='data'):
        torch.export.export(Maps(), maps, strict=False)


def test_results_of_sizes_alone_keep_values_and_others_are_plain():
    image = torch.randn(1, 2, 6, 7)
    with known_sizes():
        sizes = torch._shape_as_tensor(image)
        kind = type(sizes)
        assert kind is not torch.Tensor and sizes.dtype == torch.int64 and sizes.tolist() == [1, 2, 6, 7]
        half = (sizes[2:] // 2).float() + 0.5
        assert type(half) is kind and half.dtype == torch.float32 and half.tolist() == [3.5, 3.5]
        assert {type(part) for part in sizes.split([2, 2])} == {kind}
        assert type(sizes + torch.ones(4, dtype=torch.int64)) is torch.Tensor
        assert type(image * sizes[3]) is torch.Tensor
        assert (image * sizes[3]).equal(image * 7)


def test_torch_is_left_as_it_was():
    before = torch._shape_as_tensor
    with pytest.raises(ZeroDivisionError), known_sizes():
        assert torch._shape_as_tensor is not before
        raise ZeroDivisionError
    assert torch._shape_as_tensor is before and type(torch._shape_as_tensor(torch.zeros(2, 3))) is torch.Tensor
