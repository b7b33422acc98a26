from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from mmdet_ptq.engine import stage_store
from mmdet_ptq.engine.stage_store import StageStore, fingerprint, latest_checkpoint, stage_inputs
from mmdet_ptq.errors import PTQError


def test_a_fingerprint_depends_on_every_part_and_not_on_the_order_of_keys():
    assert fingerprint(dict(a=1, b=2)) == fingerprint(dict(b=2, a=1))
    assert fingerprint(dict(a=1)) != fingerprint(dict(a=2)) != fingerprint(dict(a=1), 1)


def test_a_fingerprint_is_the_one_that_work_directories_of_before_hold():
    assert fingerprint(dict(preset='w8a8'), ['1.jpg']) == '91c66af81711bd83'


def test_types_of_sections_that_are_gone_stand_in_the_hashes():
    recipe = dict(protect=None, export=[], reconstruct=dict(iters=1), global_loss=dict(lr=1.0))
    types = dict(reconstruct='mmdet_ptq.BlockReconstruction', global_loss='mmdet_ptq.FilteredGlobalLoss')
    before = {key: dict(recipe[key], type=kind) for key, kind in types.items()}
    assert stage_inputs(recipe) == stage_inputs({**recipe, **before})
    before['reconstruct'].update(rounding_weight=0.01, warmup=0.2, beta_start=20, beta_end=2)
    before['global_loss'].update(p=1)
    assert stage_inputs(recipe) == stage_inputs({**recipe, **before})
    assert stage_inputs({**recipe, 'reconstruct': None}) != stage_inputs(recipe)


def test_a_stage_is_taken_over_only_when_asked_and_for_the_same_inputs(tmp_path):
    assert StageStore(tmp_path, resume=True).run('observe', 'x', lambda: {'scale': torch.ones(2)})[1] is False
    state, taken_over = StageStore(tmp_path, resume=True).run('observe', 'x', lambda: None)
    assert taken_over and torch.equal(state['scale'], torch.ones(2))
    assert StageStore(tmp_path, resume=True).run('observe', 'y', lambda: 1) == (1, False)
    assert StageStore(tmp_path, resume=False).run('observe', 'y', lambda: 2) == (2, False)


@pytest.mark.parametrize('main_has_it', [True, False])
def test_a_stage_is_taken_over_by_all_processes_or_none(tmp_path, monkeypatch, main_has_it):
    if not main_has_it:
        StageStore(tmp_path, resume=True).run('observe', 'x', lambda: 1)
    monkeypatch.setattr(stage_store, 'broadcast_object_list', lambda values: values.__setitem__(0, main_has_it))
    store = StageStore(tmp_path, resume=True)
    if main_has_it:
        with pytest.raises(PTQError, match='^process 0 of this run cannot take over the stage observe, and process 0'):
            store.run('observe', 'x', lambda: 2)
    else:
        assert store.run('observe', 'x', lambda: 2) == (2, False)


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    store = StageStore(tmp_path, resume=True)
    try:
        store.run('observe', 'x', lambda: 1 / 0)
    except ZeroDivisionError:
        pass
    assert store.finished('observe', 'x') is None


def test_the_time_of_an_interrupted_stage_is_added(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr('mmdet_ptq.engine.stage_store.time.perf_counter', lambda: clock[0])

    def work(ends: bool) -> None:
        clock[0] += 0.2
        if not ends:
            raise KeyboardInterrupt

    def seconds(inputs: str, ends: bool, resume: bool = True) -> float | None:
        store = StageStore(tmp_path, resume)
        with nullcontext() if ends else pytest.raises(KeyboardInterrupt):
            store.run('observe', inputs, lambda: work(ends))
        return store.seconds.get('observe')

    for _ in range(2):
        assert seconds('x', ends=False) is None
    assert seconds('x', ends=True) == pytest.approx(0.6)
    assert seconds('x', ends=True) == pytest.approx(0.6)  # taken over
    assert seconds('y', ends=False) is None
    assert seconds('z', ends=True) < 0.4  # of another config
    assert seconds('y', ends=False) is None
    assert seconds('y', ends=True, resume=False) < 0.4


def test_a_damaged_stage_file_counts_as_unfinished(tmp_path):
    store = StageStore(tmp_path, resume=True)
    store.run('observe', 'x', lambda: torch.ones(1000))
    whole = store.path('observe').read_bytes()
    for damaged in (b'', b'not a checkpoint', whole[: len(whole) // 2]):
        store.path('observe').write_bytes(damaged)
        assert store.finished('observe', 'x') is None


@pytest.mark.parametrize('damage', [dict(state={}), dict(state=None), dict(seconds=None, seal=None)], ids=str)
def test_a_stage_file_with_another_state_counts_as_unfinished(tmp_path, damage):
    store = StageStore(tmp_path, resume=True)
    store.run('observe', 'x', lambda: dict(scale=torch.ones(3), units=[dict(name='a', seconds=1.5)]))
    assert store.finished('observe', 'x') is not None
    torch.save({**torch.load(store.path('observe')), **damage}, store.path('observe'))
    assert store.finished('observe', 'x') is None
    torch.save([], store.path('observe'))
    assert store.finished('observe', 'x') is None


@pytest.mark.parametrize(
    'text', ['', '{"inputs": "x", "sec', '[]', '{"inputs": "x"}', '{"inputs": "x", "seconds": []}']
)
def test_half_the_time_of_an_interrupted_stage_is_not_counted(tmp_path, text):
    store = StageStore(tmp_path, resume=True)
    store.folder.mkdir()
    (store.folder / 'observe_interrupted.json').write_text(text)
    assert store.run('observe', 'x', lambda: 1) == (1, False)
    assert store.seconds['observe'] < 1


def test_the_latest_checkpoint_is_the_newest_whole_one(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for iteration in (2, 10):
        torch.save(dict(iteration=iteration), tmp_path / f'iter_{iteration}.pth')
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'iter_10.pth')
    whole = (tmp_path / 'iter_10.pth').read_bytes()
    (tmp_path / 'iter_10.pth').write_bytes(whole[: len(whole) // 2])
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'iter_2.pth')
    changed = whole.replace(b'iteration', b'iterotion')
    assert changed != whole
    (tmp_path / 'iter_10.pth').write_bytes(changed)
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'iter_2.pth')
