"""The checks behind each section: types, names, seeds, and how a block is merged into a preset."""

from dataclasses import dataclass

import numpy as np
import pytest

from mmdet_ptq.config.checks import build, check_seed, check_type, known_keys, merge, positive
from mmdet_ptq.errors import PTQError


@dataclass
class Section:
    count: int = 3
    rate: float | None = None
    float: bool = False

    def check(self, key: str) -> None:
        positive(key, self, 'count')


def test_a_section_is_built_typed_and_checked():
    assert build(Section, 'ptq.own', dict(rate=2, float=True)) == Section(3, 2, True)
    with pytest.raises(PTQError, match=r"^`ptq\.own` must be a dict, got 'x'\.$"):
        build(Section, 'ptq.own', 'x')
    with pytest.raises(PTQError, match=r'^`ptq\.own\.count` must be positive, got -1\.$'):
        build(Section, 'ptq.own', dict(count=-1))
    with pytest.raises(PTQError, match=r"no key 'cuont'\. Did you mean 'count'\? Known: count, rate, float\.$"):
        build(Section, 'ptq.own', dict(cuont=1))


@pytest.mark.parametrize(
    ('value', 'kind'), [(1, int), (1, float), ((1,), list), (None, int | None), (2, float | None), (True, bool)]
)
def test_what_means_the_same_has_the_type(value, kind):
    check_type('key', value, kind)


@pytest.mark.parametrize(
    ('value', 'kind', 'told'),
    [
        (1.0, int, 'must be int, got 1.0'),
        (True, int, 'must be int, got True'),
        (True, float | None, r'must be float \| None, got True'),
        ([1], dict, r'must be dict, got \[1\]'),
        (None, str, 'must be str, got None'),
        (float('-inf'), float, 'must be a finite number, got -inf'),
    ],
)
def test_what_has_another_type_is_told_with_the_one_that_is_meant(value, kind, told):
    with pytest.raises(PTQError, match=f'^`key` {told}'):
        check_type('key', value, kind)


def test_every_key_must_be_known():
    known_keys('ptq', dict(a=1, b=2), ('b', 'a', 'c'))
    with pytest.raises(PTQError, match=r"^`ptq` has no key 'zzz'\. Known: a, b\.$"):  # nothing is like it
        known_keys('ptq', dict(a=1, zzz=2), ('a', 'b'))


def test_seeds_are_those_of_numpy():
    for seed in (0, 2**32 - 1):
        check_seed('seed', seed)
        np.random.RandomState(seed)
    for seed in (-1, 2**32, True, 1.0, '1', None):
        with pytest.raises(PTQError, match='from 0 to 4294967295, got'):
            check_seed('seed', seed)


def test_a_change_is_merged_deeply_and_leaves_both_as_they_were():
    base = dict(a=dict(b=dict(c=1, d=2)), e=[1, 2])
    change = dict(a=dict(b=dict(c=3)), e=[4], f=dict(g=[5]))
    merged = merge(base, change)
    assert merged == dict(a=dict(b=dict(c=3, d=2)), e=[4], f=dict(g=[5]))
    merged['f']['g'].append(6)
    merged['a']['b']['d'] = 7
    assert change == dict(a=dict(b=dict(c=3)), e=[4], f=dict(g=[5])) and base['a']['b'] == dict(c=1, d=2)


def test_arguments_are_inherited_by_the_same_type_alone():
    base = dict(quantizer=dict(type='mmdet_ptq.Own', k=1), overrides=dict(neck=dict(bits=4)))
    for kind in ('Own', 'mmdet_ptq.Own', 'other.Own'):
        assert merge(base, dict(quantizer=dict(type=kind)))['quantizer'] == dict(type=kind, k=1)
    assert merge(base, dict(quantizer=dict(k=2)))['quantizer'] == dict(type='mmdet_ptq.Own', k=2)
    assert merge(base, dict(quantizer=dict(type='mmdet_ptq.Other')))['quantizer'] == dict(type='mmdet_ptq.Other')
    assert merge(base, dict(quantizer=None))['quantizer'] is None
    # their order tells which one holds: new ones stand for all
    assert merge(base, dict(overrides=dict(head={})))['overrides'] == dict(head={})
