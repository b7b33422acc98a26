"""Module calls under way: which one an operation belongs to, and its number in it."""

import pytest

from mmdet_ptq.wrapping.watching.frames import Frame, Frames


@pytest.fixture
def frames():
    return Frames()


def test_calls_of_a_function_are_numbered_in_their_call_of_the_module():
    frame = Frame('neck', 2)
    keys = [frame.next(function) for function in ('add', 'add', 'cat', 'add')]
    assert keys == [('neck', 2, 'add', 0), ('neck', 2, 'add', 1), ('neck', 2, 'cat', 0), ('neck', 2, 'add', 2)]
    assert Frame('neck', 3).next('add') == ('neck', 3, 'add', 0)


def test_an_operation_belongs_to_the_innermost_call(frames):
    assert frames.top is None
    frames.enter('neck')
    assert frames.top.next('add') == ('neck', 0, 'add', 0)
    frames.enter('neck.conv')
    assert frames.top.next('add') == ('neck.conv', 0, 'add', 0)
    frames.leave()
    # the outer call goes on counting where it was
    assert frames.top.next('add') == ('neck', 0, 'add', 1)
    frames.leave()
    assert frames.top is None


def test_each_module_counts_its_own_calls_also_within_itself(frames):
    for module in ('head', 'head', 'neck'):
        frames.enter(module)
    assert [(frame.module, frame.call) for frame in frames.stack] == [('head', 0), ('head', 1), ('neck', 0)]
    frames.leave()
    frames.enter('neck')
    assert (frames.top.call, frames.calls) == (1, {'head': 2, 'neck': 2})


def test_operations_of_a_muted_call_are_of_nobody(frames):
    frames.enter('neck')
    frames.mute('a hook hands on the module', 'and its arguments')
    assert frames.top is None
    frames.enter('neck.conv')
    assert frames.top.module == 'neck.conv'
    frames.leave('module', 'arguments', 'result')
    assert frames.top is None
    frames.leave()
    assert frames.top.module == 'neck' and frames.calls == {'neck': 1, 'neck.conv': 1}


def test_a_call_that_nobody_saw_begin_may_end(frames):
    frames.leave()
    frames.enter('neck')
    assert [frame.call for frame in frames.stack] == [0]
