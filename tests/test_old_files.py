"""Files that earlier versions wrote: they open, and give what they gave, or say what to do.

``old_files/schema_3``: a tiny RetinaNet, W8A8 with ``dataflow='full'``, by the commit before sums of
neighbouring weights were bounded; and what its integer kernels returned on :func:`image`.
``old_files/half_finished.tar.xz``: the work directory of a run that was stopped in its global stage, by the commit
before the rooms were moved, with its data; and the checkpoint to which that commit finished it.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdet_ptq.deploy import (
    get_runtime,
    integer_arithmetic,
    load_quantized_state,
    open_model,
    quantized_state,
    read_quantized,
)
from mmdet_ptq.deploy import runtime as base
from mmdet_ptq.deploy.checkpoint.packing import unflatten_tensors
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.doctor import processor
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.engine.global_stage.loops import GlobalCalibrationLoop
from mmdet_ptq.engine.stage_store import StageStore
from mmdet_ptq.testing import tiny_config, tiny_detector, tiny_model_cfg
from mmdet_ptq.wrapping import Structure

FOLDER = Path(__file__).resolve().parent / 'old_files' / 'schema_3'


def image():
    return np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope='module')
def outputs():
    with np.load(FOLDER / 'outputs.npz') as stored:
        return list(stored.values())


@pytest.fixture(scope='module')
def detector():
    detector = tiny_detector('retinanet', seed=7)
    load_quantized_state(detector, read_quantized(FOLDER / 'quantized.pth'))
    return detector.eval()


@pytest.fixture
def warned(monkeypatch):
    said = []
    base.warn_once.cache_clear()
    monkeypatch.setattr(base, 'print_log', lambda text, *_: said.append(text))
    return said


def saturating(monkeypatch, saturates):
    monkeypatch.setattr(get_runtime('onnxruntime'), 'saturates', staticmethod(lambda: saturates))


def test_an_old_checkpoint_gives_its_figures(detector, outputs):
    with torch.no_grad(), integer_arithmetic(detector):
        found = RawOutputs(detector)(torch.from_numpy(image()))
    for ours, theirs in zip(found, outputs, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_an_old_checkpoint_keeps_its_codes_when_it_is_saved_again(detector):
    old = read_quantized(FOLDER / 'quantized.pth')
    config = dict(model=tiny_model_cfg('retinanet'))
    new = quantized_state(detector, Structure.from_dict(old['structure']), config, None)
    assert new['layers'] == old['layers']
    for dtype, codes in old['codes']['data'].items():
        assert torch.equal(new['codes']['data'][dtype], codes)


def test_an_old_model_opens_and_says_what_to_do_where_it_is_wrong(outputs, monkeypatch, warned):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    if not get_runtime('onnxruntime').saturates():
        for ours, theirs in zip(open_model(FOLDER / 'model.onnx')(image()), outputs, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    saturating(monkeypatch, False)
    assert open_model(FOLDER / 'model.onnx').remark() == '' and warned == []
    saturating(monkeypatch, True)
    assert open_model(FOLDER / 'model.onnx').remark() == warned[0]
    assert 'may saturate' in warned[0] and 'export its checkpoint again' in warned[0]


@pytest.mark.thorough
def test_an_old_checkpoint_exported_again_names_the_layers_that_saturate(detector, tmp_path, monkeypatch, warned):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    path = get_runtime('onnxruntime').export(detector, tmp_path, (1, 3, 64, 64))
    saturating(monkeypatch, True)
    model = open_model(path)
    assert len(model.meta['saturating']) > 3
    assert f'the products of {len(model.meta["saturating"])} of its layers saturate' in warned[0]
    assert "calibrate again with this version of mmdet-ptq and `ptq.saturation='safe'`" in warned[0]


def test_a_half_finished_run_goes_on(tmp_path, monkeypatch):
    cfg = tiny_config('retinanet', tmp_path / 'data')
    with tarfile.open(FOLDER.parent / 'half_finished.tar.xz') as archive:
        archive.extractall(tmp_path, filter='data')
    cfg.ptq.head = dict(weights=dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer', mode='log1p')))
    cfg.ptq.reconstruct = None
    cfg.ptq.activations = dict(observer=dict(type='mmdet_ptq.MSEObserver'))  # the default then
    cfg.work_dir, cfg.resume = str(tmp_path / 'work_dir'), True
    taken_over, run, started = {}, StageStore.run, []

    def spy(store, name, inputs, work):
        state, taken_over[name] = run(store, name, inputs, work)
        return state, taken_over[name]

    run_iter = GlobalCalibrationLoop.run_iter
    monkeypatch.setattr(StageStore, 'run', spy)
    monkeypatch.setattr(
        GlobalCalibrationLoop, 'run_iter', lambda loop, batch: started.append(loop.iter) or run_iter(loop, batch)
    )
    PTQRunner.from_cfg(cfg).calibrate()
    assert taken_over == dict(prepare=True, observe=True) | {'global': False}
    assert started == [2, 3]
    found, expected = (read_quantized(tmp_path / folder / 'quantized.pth') for folder in ('work_dir', 'expected'))
    # fields that came later have their defaults
    assert Structure.from_dict(found['structure']) == Structure.from_dict(expected['structure'])
    ours, theirs = (unflatten_tensors(state['codes']) for state in (found, expected))
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(codes.int() - theirs[name].int()).abs().flatten() for name, codes in ours.items()])
    if 'AMD' in processor()[0] and torch.backends.cpu.get_cpu_capability() == 'AVX512':  # as where they were made
        assert not apart.any()
    else:  # sums round otherwise, and a gradient that is rounding noise makes as large a step in Adam as any other
        assert (apart == 0).float().mean() > 0.9 and apart.max() <= 8
