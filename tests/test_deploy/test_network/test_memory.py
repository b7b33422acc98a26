"""What a network takes at once, by the sizes of its tensors."""

from __future__ import annotations

import pytest

from mmdet_ptq import PTQError
from mmdet_ptq.deploy.network.memory import GIB, Step, check_memory

SMALL, LARGE = dict(input_shape=[1, 3, 64, 64]), dict(input_shape=[1, 3, 2048, 2048])
PART = 3 * GIB // 10


def chain(last: list[str]) -> list[Step]:
    """Ten tensors, each made of the one before."""
    steps = [Step('Relu', [f't{n - 1}'], {f't{n}': PART}) for n in range(10)]
    return [*steps, Step('Sum', last, {'sum': 4})]


def test_only_what_is_alive_counts():
    assert check_memory('m', chain(['t9']), ['sum'], SMALL, 0)
    with pytest.raises(PTQError, match="'m' takes 0.9 GiB .* 0.3 GiB for 't0' .Relu. alone, .* less than 0.8 GiB"):
        check_memory('m', chain([f't{n}' for n in range(10)]), ['sum'], SMALL, 0)
    with pytest.raises(PTQError, match='takes 0.9 GiB'):
        check_memory('m', chain(['t9']), [f't{n}' for n in range(10)], SMALL, 0)


def test_larger_images_and_larger_files_explain_more():
    steps = chain([f't{n}' for n in range(10)])
    assert check_memory('m', steps, ['sum'], LARGE, 0)
    assert check_memory('m', steps, ['sum'], SMALL, GIB // 4)


def test_a_size_that_nobody_knows_is_told():
    assert not check_memory('m', [Step('NonZero', ['input'], {'places': None})], ['places'], SMALL, 0)
