import torch
from torch import nn

from mmdet_ptq.analysis import bops, float_bops, float_size_bytes, part_summary
from mmdet_ptq.wrapping import Structure


def test_float_size_counts_each_float_tensor_once():
    shared = nn.Linear(3, 2)  # 8 numbers
    model = nn.ModuleDict(dict(a=shared, b=shared, norm=nn.BatchNorm1d(5)))  # 4 x 5 numbers and a counter
    model.register_buffer('ids', torch.zeros(7, dtype=torch.long))
    model.register_buffer('cache', torch.zeros(9), persistent=False)
    assert float_size_bytes(model) == 4 * (8 + 20)


def test_bops_by_hand(structure):
    # the shared layer counts its widest input, what is not quantized 32 x 32
    assert bops(structure) == 1000 * 4 * 8 + 500 * 8 * 16 + (10 + 90) * 32 * 32
    assert float_bops(structure) == 1600 * 32 * 32


def test_bops_of_a_float_input(structure):
    structure.layers[1].inputs[1] = None
    assert bops(structure) == 1000 * 4 * 8 + 500 * 8 * 32 + 100 * 32 * 32


def test_nothing_costs_nothing():
    assert bops(Structure()) == float_bops(Structure()) == 0
    assert part_summary(Structure()) == []


def test_part_summary(structure):
    backbone, head = part_summary(structure)
    assert (backbone.part, backbone.macs, backbone.integer_share, backbone.weights) == ('backbone', 1000, 1.0, {4: 100})
    assert (head.part, head.macs, head.integer_macs, head.weights) == ('head', 600, 500, {8: 20, 32: 30})


def test_eight_bits_cost_a_sixteenth(tiny):
    assert float_bops(tiny.structure) == 16 * bops(tiny.structure) > 0
