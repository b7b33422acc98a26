"""The text inside an integer checkpoint: the same data back, and nothing that is damaged or made to cost a lot."""

import json
import zlib

import numpy as np
import pytest
import torch

from mmdet_ptq.deploy.checkpoint.text import GROUPS, MOST_TEXT, PLAIN, TEXT, pack_state, unpack_state
from mmdet_ptq.fields import Malformed


@pytest.fixture
def state():
    groups = {
        group: dict(index=[[name, [2, 3], 'torch.int8', 0]], data={'torch.int8': torch.arange(6).to(torch.int8)})
        for group, name in zip(GROUPS, ('a.weight', 'b.table', 'c.bias'), strict=True)
    }
    config = dict(
        scale=(1333, 800),
        pipeline=[dict(type='Resize', sizes=[(1, 2.5), ()]), None],
        empty={},
        name='ü',
        nested=((1,),),
    )
    return dict(format='mmdet_ptq', schema=7, version='0.2.0', config=config, recipe=[True, 1e-30, -1], **groups)


def text_of(packed):
    return zlib.decompress(packed[TEXT].numpy().tobytes())


def with_text(packed, text, compress=zlib.compress):
    return {**packed, TEXT: torch.from_numpy(np.frombuffer(compress(text), np.uint8).copy())}


def test_what_was_packed_comes_back_with_its_tuples(state):
    packed = pack_state(state)
    again = unpack_state(packed)
    assert again == state and again['config']['scale'] == (1333, 800) and type(again['config']['pipeline']) is list
    # tensors are handed on as they are
    assert all(again[group]['data'] is packed[group] is state[group]['data'] for group in GROUPS)
    assert 'index' not in again


def test_only_what_every_reader_must_see_stands_outside_of_the_text(state):
    packed = pack_state(state)
    assert packed.keys() == {*PLAIN, *GROUPS, TEXT} and packed[TEXT].dtype == torch.uint8
    assert {key: packed[key] for key in PLAIN} == dict(format='mmdet_ptq', schema=7, version='0.2.0')
    assert json.loads(text_of(packed)).keys() == {'config', 'recipe', 'index'}
    state['recipe'] = ['backbone.layer.conv'] * 1000
    assert packed[TEXT].numel() < pack_state(state)[TEXT].numel() < 2 * packed[TEXT].numel()


def test_a_dict_that_only_looks_like_a_tuple_stays_a_dict(state):
    packed = pack_state(state)
    for value in ({'__tuple__': 3}, {'__tuple__': [1], 'and': 2}, {'__tuple__': {'a': [1]}}):
        described = {**json.loads(text_of(packed)), 'config': value}
        assert unpack_state(with_text(packed, json.dumps(described).encode()))['config'] == value


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (lambda described: [described], '^its text must be a dict, got a list'),
        (lambda described: {'__tuple__': []}, '^its text must be a dict, got a tuple'),
        (lambda described: dict(recipe=[]), '^the index must be a dict, got None'),
        (lambda described: dict(index=dict(codes=[], tables=[])), '^the index lacks the field `tensors`'),
        (lambda described: dict(index={**described['index'], 'more': []}), 'the unknown field `more`'),
        (lambda described: dict(index={**described['index'], 'codes': 3}), r'^the index\.codes must be a list, got 3'),
        (lambda described: json.loads('[' * 150 + ']' * 150), 'its text holds too much'),
        (lambda described: {**described, 'codes': {}}, "the key 'codes', which stands beside it"),
        (lambda described: {**described, 'schema': 1}, "the key 'schema', which stands beside it"),
    ],
)
def test_a_text_of_another_form_is_refused(state, change, told):
    packed = pack_state(state)
    changed = change(json.loads(text_of(packed)))
    with pytest.raises(Malformed, match=told):
        unpack_state(with_text(packed, json.dumps(changed).encode()))


def test_a_text_that_is_no_text_is_refused(state):
    packed = pack_state(state)
    with pytest.raises(Malformed, match='its text is nested too deep'):
        unpack_state(with_text(packed, b'[' * 100000))
    with pytest.raises(ValueError):
        unpack_state(with_text(packed, text_of(packed)[:-1]))
    with pytest.raises(Malformed, match='its text breaks off'):
        unpack_state({**packed, TEXT: packed[TEXT][:-5]})
    with pytest.raises(zlib.error):
        unpack_state(with_text(packed, b'{}', bytes))


def test_a_text_that_would_fill_the_memory_is_not_unpacked(state):
    bomb = zlib.compress(bytes(2 * MOST_TEXT), 1)
    with pytest.raises(Malformed, match='its text is longer than 16 MiB'):
        unpack_state(with_text(pack_state(state), bomb, bytes))
