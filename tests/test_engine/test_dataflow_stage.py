"""Runs that quantize between the layers, too: all stages, killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdet_ptq import load_quantized
from mmdet_ptq.engine.global_stage.loops import GlobalCalibrationLoop
from mmdet_ptq.engine.stage_store import StageStore, stage_inputs
from mmdet_ptq.testing import raw_outputs

FULL = {
    'ptq.dataflow': 'full',
    'ptq.global_loss.holdout': 0.0,
    'ptq.reconstruct': dict(iters=2, batch_size=2, granularity='block'),
}


@pytest.fixture
def stages(monkeypatch) -> dict[str, bool]:
    """Stage name to whether it was taken over."""
    seen, run = {}, StageStore.run

    def spy(self, name, inputs, work):
        state, seen[name] = run(self, name, inputs, work)
        return state, seen[name]

    monkeypatch.setattr(StageStore, 'run', spy)
    return seen


def same(a, b) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.thorough
def test_an_interrupted_run_resumes_to_the_same_detector(make_runner, tmp_path, monkeypatch, stages):
    whole = make_runner(FULL, tmp_path / 'whole')
    whole.run()
    assert whole.structure.sites and not whole.structure.islands
    run_iter = GlobalCalibrationLoop.run_iter

    def interrupted(self, batch):
        if self.iter == 3:
            raise KeyboardInterrupt
        run_iter(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(GlobalCalibrationLoop, 'run_iter', interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_runner(FULL, tmp_path / 'killed').run()
    stages.clear()
    resumed = make_runner(FULL, tmp_path / 'killed', resume=True)
    resumed.run()
    assert [stages[name] for name in ('prepare', 'observe', 'reconstruct', 'global')] == [True, True, True, False]
    assert resumed.structure == whole.structure
    outputs = raw_outputs(whole.detector)
    assert same(raw_outputs(resumed.detector), outputs)
    loaded = load_quantized(Path(resumed.work_dir) / 'quantized.pth')
    assert same(raw_outputs(loaded), outputs)
    # the global stage has moved scales that no layer input has
    observed = torch.load(tmp_path / 'whole' / 'stages' / 'observe.pth', weights_only=True)['state']
    key = 'ptq.activations.neck/lateral_convs/0/conv:out.scale'
    assert whole.detector.state_dict()[key] != observed[key]


def test_prepare_depends_on_the_dataflow():
    recipe = dict(dataflow=None, protect=None, reconstruct=None, global_loss=None)
    before, after = stage_inputs(recipe), stage_inputs({**recipe, 'dataflow': 'full'})
    assert all(before[stage] != after[stage] for stage in before)
