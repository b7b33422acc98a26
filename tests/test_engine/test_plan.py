"""The plan of a run: the stages that then run, the layers that then stay float."""

from __future__ import annotations

import pytest

from mmdet_ptq.engine.plan import make_plan, plan_lines


def test_every_stage_that_ran_was_planned_in_its_order(finished, make_runner):
    runner = make_runner()
    runner.check()
    plan = make_plan(runner)
    assert list(plan.seconds) == list(finished.results['stages'])
    assert all(seconds > 0 for seconds in plan.seconds.values()) and plan.memory > 1e8


def test_runtimes_with_a_calibration_of_their_own_have_stages_of_their_own(make_runner):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    runner = make_runner({'ptq.export': ['onnxruntime', 'openvino']})
    runner.check()
    planned = list(make_plan(runner).seconds)
    assert planned[:2] == ['export_onnxruntime_float', 'export_openvino_float']
    assert [name for name in planned if name.startswith('openvino_')] == [
        'openvino_prepare',
        'openvino_observe',
        'openvino_global',
        'openvino_evaluate_simulated',
        'openvino_export_openvino',
    ]


def test_layers_that_stay_float_are_those_of_the_quantized_detector(make_runner):
    runner = make_runner({'ptq.overrides': {'neck': 'float', 'backbone.conv1': dict(weights=dict(float=True))}})
    runner.check()
    before = {name: value.clone() for name, value in runner.detector.state_dict().items()}
    plan = make_plan(runner)
    assert all(value.equal(before[name]) for name, value in runner.detector.state_dict().items())
    runner.prepare()
    assert plan.layers == {layer.name: layer.reason for layer in runner.structure.layers}
    assert sum(map(bool, plan.layers.values())) > 2
    told = '\n'.join(plan_lines(runner, plan))
    assert 'backbone.conv1' in told and 'its weight is left float by the policy' in told
