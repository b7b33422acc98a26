import copy
import math

import pytest
import torch

from mmdet_ptq.analysis import layer_errors, score_drift
from mmdet_ptq.analysis.drift import compare_outputs
from mmdet_ptq.predictions import AlignedPredictions
from mmdet_ptq.wrapping import float_weight
from mmdet_ptq.wrapping.state import STATE


def test_every_layer_against_the_unfolded_original(tiny, batch):
    errors = layer_errors(tiny.original, tiny.detector, batch(3), tiny.structure.folds)
    assert {error.layer for error in errors} == {layer.name for layer in tiny.structure.layers}
    assert errors[0].layer == 'backbone.conv1' and errors[0].part == 'backbone'
    # 8 bits: clearly worse than rounding noise, clearly better than a wrong pairing
    assert all(15 < error.sqnr_db < 60 for error in errors)


def test_a_wrapped_detector_may_be_its_own_reference(tiny, batch):
    folded = layer_errors(tiny.detector, tiny.detector, batch(3), tiny.structure.folds)
    against_original = layer_errors(tiny.original, tiny.detector, batch(3), tiny.structure.folds)
    for mine, other in zip(folded, against_original, strict=True):
        assert mine.sqnr_db == pytest.approx(other.sqnr_db, abs=0.05)
    assert getattr(tiny.detector, STATE).mode == 'quantize'


def test_hooks_are_removed(tiny, batch):
    before = [len(m._forward_hooks) for m in tiny.detector.modules()]
    layer_errors(tiny.detector, tiny.detector, batch(3))
    assert [len(m._forward_hooks) for m in tiny.detector.modules()] == before


def test_nothing_quantized_is_no_error(tiny, batch):
    errors = layer_errors(tiny.original, tiny.original, batch(3))
    assert all(error.sqnr_db == math.inf and error.mean_shift_share is None for error in errors)


def test_error_starts_at_the_damaged_layer(tiny, batch):
    detector = copy.deepcopy(tiny.detector)
    name = 'bbox_head.retina_cls'
    with torch.no_grad():
        float_weight(detector.get_submodule(name)).neg_()
    damaged = {e.layer: e.sqnr_db for e in layer_errors(tiny.original, detector, batch(3), tiny.structure.folds)}
    sound = {e.layer: e.sqnr_db for e in layer_errors(tiny.original, tiny.detector, batch(3), tiny.structure.folds)}
    assert {layer for layer in sound if abs(sound[layer] - damaged[layer]) > 0.01} == {name}


def test_a_shifted_bias_is_all_mean_shift(tiny, batch):
    detector = copy.deepcopy(tiny.detector)
    with torch.no_grad():
        detector.bbox_head.retina_reg.bias.add_(5.0)
    errors = {e.layer: e for e in layer_errors(tiny.original, detector, batch(3), tiny.structure.folds)}
    assert errors['bbox_head.retina_reg'].mean_shift_share > 0.99


def test_compare_by_hand():
    signal = torch.full((2, 1000), 10.0).double()
    noise = torch.tensor([1.0, -1.0]).repeat(500).double()
    sqnr, share = compare_outputs(signal, signal + noise)
    assert sqnr == pytest.approx(20.0)
    assert share == pytest.approx(0.0, abs=1e-9)
    sqnr, share = compare_outputs(signal, signal + noise + 1.0)
    assert sqnr == pytest.approx(20 - 10 * math.log10(2))
    assert share == pytest.approx(0.5, abs=2e-3)
    assert compare_outputs(signal[:, :4], signal[:, :4] + 1)[1] is None


def test_two_stages_pair_on_the_same_proposals(tiny_two_stage, batch):
    tiny = tiny_two_stage
    errors = {e.layer: e for e in layer_errors(tiny.original, tiny.detector, batch(3), tiny.structure.folds)}
    assert errors['roi_head.bbox_head.fc_cls'].sqnr_db > 15
    drift = score_drift(tiny.original, tiny.detector, [batch(3)])
    assert drift.reason == '' and len(drift.ious) == len(drift.float_scores) > 0


def test_score_drift(tiny, batch):
    drift = score_drift(tiny.original, tiny.detector, [batch(3), batch(4)], score_thr=0.0)
    priors = sum(math.prod(size) for size in ((16, 24), (8, 12)))
    assert len(drift.float_scores) == len(drift.quantized_scores) == len(drift.ious) == 4 * priors
    assert 0 < drift.mean_drift < 0.05
    assert abs(drift.mean_shift) <= drift.mean_drift


def test_no_drift_against_itself(tiny, batch):
    drift = score_drift(tiny.original, tiny.original, [batch(3)], score_thr=0.0)
    assert drift.mean_drift == 0
    assert drift.ious.min() > 0.999


def test_reasons(tiny, monkeypatch, batch):
    assert 'no images' in score_drift(tiny.original, tiny.detector, []).reason
    assert 'confident' in score_drift(tiny.original, tiny.detector, [batch(3)], score_thr=1.1).reason
    monkeypatch.setattr(
        'mmdet_ptq.analysis.drift.predict_aligned', lambda *_: AlignedPredictions(None, raw=[torch.zeros(1)])
    )
    assert 'no adapter' in score_drift(tiny.original, tiny.detector, [batch(3)]).reason
