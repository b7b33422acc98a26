"""The grammar of names: told apart, and read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdet_ptq.wrapping.names import activation_of, call_name, input_name, layer_of, output_name, result_name, run_name

PATHS = st.lists(st.sampled_from(['neck', 'convs', '0', '11', 'a_b']), min_size=1, max_size=3).map('.'.join)
CALLS = st.none() | st.integers(0, 12)


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        (input_name('neck.convs.0'), 'neck/convs/0'),
        (input_name('head.cls', 2), 'head/cls#2'),
        (output_name('neck.convs.0'), 'neck/convs/0:out'),
        (output_name('head.cls', 0), 'head/cls:out#0'),
        (result_name('head', 'add', 0), 'head:add'),
        (result_name('head', 'add', 1, 3), 'head:add-1#3'),
        (call_name('head.cls', 0), 'head.cls'),
        (call_name('head.cls', 1), 'head.cls#1'),
        (run_name('head/cls', 0), 'head/cls'),
        (run_name('head/cls#1', 2), 'head/cls#1@2'),
    ],
)
def test_names_are_those_of_stored_checkpoints(name, expected):
    assert name == expected


@given(PATHS, st.integers(0, 12))
def test_calls_and_runs_are_read_back(path, number):
    assert layer_of(call_name(path, number)) == path
    activation = input_name(path, number)
    assert activation_of(run_name(activation, number)) == activation


@given(PATHS, PATHS, CALLS, CALLS)
def test_no_two_tensors_share_a_name(a, b, first, second):
    names = [
        input_name(a, first),
        output_name(a, first),
        result_name(a, 'add', 0, first),
        result_name(a, 'add', 1, first),
    ]
    others = [input_name(b, second), output_name(b, second)]
    assert len(set(names)) == len(names)
    assert bool(set(names) & set(others)) == ((a, first) == (b, second))
