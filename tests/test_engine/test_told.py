"""What a person is told of a run's stages: begun with the time that is expected, taken over, and how far each is."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from mmdet_ptq.engine.told import ProgressHook, ToldStages


@pytest.fixture
def said(monkeypatch):
    """What would have been shown."""
    said = []

    @contextmanager
    def stage(name, expected):
        said.append(('begins', name, expected))
        yield
        said.append(('ends', name))

    monkeypatch.setattr('mmdet_ptq.engine.told.stage', stage)
    monkeypatch.setattr('mmdet_ptq.engine.told.taken_over', lambda name: said.append(('as before', name)))
    monkeypatch.setattr('mmdet_ptq.engine.told.step', lambda *step: said.append(step))
    return said


def test_a_stage_is_told_while_it_runs_and_as_taken_over_afterwards(said, tmp_path):
    stages = ToldStages(tmp_path, resume=True)
    stages.expected = dict(observe=12.5)
    assert stages.run('observe', 'inputs', lambda: said.append('works') or dict(a=1)) == (dict(a=1), False)
    assert said == [('begins', 'observe', 12.5), 'works', ('ends', 'observe')]
    said.clear()
    assert ToldStages(tmp_path, resume=True).run('observe', 'inputs', lambda: None) == (dict(a=1), True)
    assert said == [('as before', 'observe')]


def test_what_cannot_be_taken_over_is_not_said_to_be(said, tmp_path):
    ToldStages(tmp_path, resume=False).run('observe', 'inputs', lambda: dict(a=1))
    said.clear()
    for resume, inputs in ((True, 'others'), (False, 'inputs')):
        assert ToldStages(tmp_path, resume).finished('observe', inputs) is None
    assert said == []
    # nobody has thought of how long it takes
    ToldStages(tmp_path, resume=False).run('observe', 'others', lambda: dict(a=2))
    assert said == [('begins', 'observe', None), ('ends', 'observe')]


def test_a_stage_of_a_part_is_told_with_the_part(said, tmp_path):
    stages = ToldStages(tmp_path, resume=True)
    stages.expected = dict(onnxruntime_observe=3.0, observe=100.0)
    part = stages.within('onnxruntime')
    part.run('observe', 'inputs', lambda: dict(a=1))
    part.run('observe', 'inputs', lambda: dict(a=1))
    name = 'onnxruntime_observe'
    assert said == [('begins', name, 3.0), ('ends', name), ('as before', name)]
    assert stages.current == name and set(stages.seconds) == {name}


def test_a_stage_that_fails_ends_nothing(said, tmp_path):
    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        ToldStages(tmp_path, resume=False).run('observe', 'inputs', fail)
    assert said == [('begins', 'observe', None)]


def test_loops_are_shown_by_what_is_done_and_not_by_what_is_begun(said):
    hook = ProgressHook()
    hook.after_train_iter(SimpleNamespace(iter=0, max_iters=200), 0)
    hook.after_train_iter(SimpleNamespace(iter=199, max_iters=200), 199)
    hook.after_test_iter(SimpleNamespace(test_loop=SimpleNamespace(dataloader=range(7))), 6)
    assert said == [('training', 1, 200), ('training', 200, 200), ('batches', 7, 7)]
