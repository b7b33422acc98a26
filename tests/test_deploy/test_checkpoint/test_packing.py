import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_ptq.deploy.checkpoint.packing import flatten_tensors, pack_codes, unflatten_tensors, unpack_codes


@settings(deadline=None, max_examples=100)
@given(
    bits=st.integers(2, 16),
    shape=st.lists(st.integers(0, 5), max_size=4),
    signed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_round_trip_and_exact_size(bits, shape, signed, seed):
    lowest = -(1 << bits - 1) if signed else 0
    offsets = np.random.default_rng(seed).integers(0, 1 << bits, shape)
    codes = torch.as_tensor(offsets + lowest, dtype=torch.int32).reshape(shape)
    packed = pack_codes(codes, bits, lowest)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(codes.numel() * bits / 8)
    again = unpack_codes(packed, bits, lowest, tuple(shape))
    assert again.dtype == torch.int32
    assert again.shape == codes.shape
    assert torch.equal(again, codes)


@pytest.mark.parametrize('bits', range(2, 17))
def test_extreme_codes(bits):
    lowest = -(1 << bits - 1)
    codes = torch.tensor([lowest, -1, 0, -lowest - 1], dtype=torch.int32)
    assert unpack_codes(pack_codes(codes, bits, lowest), bits, lowest, (4,)).tolist() == codes.tolist()


def test_two_four_bit_codes_share_a_byte():
    assert pack_codes(torch.tensor([3, 12]), 4, 0).tolist() == [3 | 12 << 4]


@pytest.mark.parametrize('code', [-9, 8])
def test_codes_out_of_range_are_refused(code):
    with pytest.raises(ValueError, match='do not fit 4 bits'):
        pack_codes(torch.tensor([0, code]), 4, -8)


def test_wrong_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match='do not hold'):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, 0, (7,))


def test_flatten_round_trip():
    tensors = {
        'float': torch.randn(2, 3),
        'more': torch.randn(4),
        'zeros': torch.zeros(5, 2),
        'scalar': torch.tensor(1.5),
        'zero scalar': torch.tensor(0),
        'long': torch.arange(4),
        'int': torch.tensor([[7]], dtype=torch.int32),
        'uint8': torch.tensor([255], dtype=torch.uint8),
        'bool': torch.tensor([True, False]),
        'empty': torch.zeros(0, 3),
        'half': torch.randn(3).half(),
        'even': torch.full((3, 2), math.inf),
        'even int': torch.full((2,), -300),
        'wide': torch.tensor([-(2**40), 5]),
        'minus': torch.tensor([-128, 127]),
    }
    flat = flatten_tensors(tensors)
    again = unflatten_tensors(flat)
    assert list(again) == list(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].shape == tensor.shape
        assert torch.equal(again[name], tensor)
    # one number all over is stored once, integers in the smallest dtype that holds them
    assert {dtype: data.numel() for dtype, data in flat['data'].items()} == dict(
        float32=6 + 4 + 1 + 1, uint8=4 + 1 + 1, bool=2, float16=3, int16=1, int64=2, int8=2
    )


def test_flattened_tensors_do_not_share_memory():
    again = unflatten_tensors(flatten_tensors({'a': torch.ones(2), 'b': torch.ones(2)}))
    again['a'].zero_()
    assert again['b'].tolist() == [1, 1]
