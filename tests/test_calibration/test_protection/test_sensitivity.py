import copy
import json

import pytest
from sensitive import BAD, OBSERVE, PER_TENSOR, images, prepared, with_a_bad_tensor

from mmdet_ptq.calibration.protection import damage as meter_module
from mmdet_ptq.calibration.protection.sensitivity import measure_sensitivity, tensor_sets
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.testing import raw_outputs, tiny_quantized


@pytest.fixture(scope='module')
def retinanet():
    return tiny_quantized('retinanet')


@pytest.fixture
def forwards(monkeypatch):
    """Counts forward passes."""
    calls, real = [], meter_module.predict_aligned

    def counted(*args):
        calls.append(1)
        if len(calls) > counted.limit:
            raise KeyboardInterrupt
        return real(*args)

    counted.limit = 10**6
    monkeypatch.setattr(meter_module, 'predict_aligned', counted)
    return calls, counted


def test_the_bad_tensor_ranks_first():
    detector = with_a_bad_tensor()
    quantized, structure = prepared(detector, PTQConfig.from_dict(PER_TENSOR))
    with quantized_off(quantized):
        for a, b in zip(raw_outputs(quantized), raw_outputs(detector), strict=True):
            assert (a - b).abs().max() < 1e-3 * b.abs().max()
    result = measure_sensitivity(quantized, structure, images())
    worst, second = result.tensors[:2]
    assert (worst.kind, worst.layers, worst.part) == ('activation', (BAD,), 'backbone')
    assert worst.damage.loss > 1.2 * second.damage.loss
    assert worst.damage.iou_loss > 0 and worst.damage.output_error > 0.01
    assert result.groups[0].name == 'backbone'


def quantized_off(detector):
    from mmdet_ptq.wrapping import quantization_mode

    return quantization_mode(detector, 'float')


@pytest.mark.thorough
def test_every_tensor_and_part_is_ranked_and_twice_the_same(retinanet):
    detector, structure = retinanet
    first, again = (measure_sensitivity(copy.deepcopy(detector), structure, images()) for _ in range(2))
    assert first == again
    losses = [tensor.damage.loss for tensor in first.tensors]
    assert losses == sorted(losses, reverse=True)
    names = {(tensor.kind, tensor.name) for tensor in first.tensors}
    assert names == {('activation', name) for name in structure.activations} | {
        ('weight', layer.name) for layer in structure.layers
    }
    assert {'backbone', 'neck', 'class branch', 'box branch', 'outputs', 'level 0', 'level 1', 'level 2'} <= {
        group.name for group in first.groups
    }
    json.dumps(first.to_dict(), allow_nan=False)


@pytest.mark.thorough
def test_tensors_that_are_quantized_where_they_are_computed(retinanet):
    flowing, structure = tiny_quantized('retinanet', {**OBSERVE, 'dataflow': 'full'})
    plain, found = (measure_sensitivity(*each, images()) for each in (retinanet, (flowing, structure)))
    tensors = {tensor.name: tensor for tensor in found.tensors if tensor.kind == 'activation'}
    assert tensors.keys() == structure.activations.keys()
    # alone, a tensor comes to its readers as if they had quantized it
    read = {t.name: t.damage.output_error for t in plain.tensors if t.kind == 'activation'}
    assert {name: tensors[name].damage.output_error for name in read} == pytest.approx(read, rel=1e-3)
    unread = {name: tensor for name, tensor in tensors.items() if name not in read}
    assert all(t.damage.loss > 0 and t.damage.output_error is None for t in unread.values())
    scores, residual = unread['bbox_head/retina_cls:out#1'], unread['backbone/layer2/0/conv2:out']
    assert (scores.part, scores.level, scores.output) == ('class branch', 1, True)
    assert scores.label == 'output of bbox_head.retina_cls (call 1)'
    assert (residual.part, residual.label) == ('between the layers', 'output of backbone.layer2.0.conv2')
    group = next(group for group in found.groups if group.name == 'between the layers')
    assert group.tensors == sum(t.part == 'between the layers' for t in unread.values()) > 1


@pytest.mark.thorough
def test_an_interrupted_analysis_goes_on(retinanet, forwards, tmp_path, monkeypatch):
    detector, structure = retinanet
    calls, counted = forwards
    expected = measure_sensitivity(detector, structure, images())
    whole = len(calls)
    counted.limit = whole + 30
    path = tmp_path / 'measurements.json'
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(detector, structure, images(), path)
    assert detector.ptq.mode == 'quantize' and detector.ptq.only is None
    counted.limit = 10**6
    calls.clear()
    assert measure_sensitivity(detector, structure, images(), path) == expected
    assert len(calls) < whole - 20
    calls.clear()
    measure_sensitivity(detector, structure, images(seed=6), path)  # other images: nothing is taken over
    assert len(calls) == whole
    monkeypatch.setattr('mmdet_ptq.calibration.protection.damage.STATE_FORMAT', 'another')
    calls.clear()
    measure_sensitivity(detector, structure, images(seed=6), path)
    assert len(calls) == whole


def test_a_damaged_resume_file_is_not_used(retinanet, forwards, tmp_path):
    detector, structure = retinanet
    path = tmp_path / 'measurements.json'
    path.write_text('{"fingerprint": ')
    measure_sensitivity(detector, structure, images(), path)
    assert len(json.loads(path.read_text())['damage']) > 40


def test_what_one_override_changes_belongs_together(retinanet):
    _, structure = retinanet
    sets = tensor_sets(structure)
    shared = next(s for s in sets if 'bbox_head.cls_convs.0.conv' in s.layers and s.kind == 'activation')
    assert shared.layers == ('bbox_head.cls_convs.0.conv', 'bbox_head.reg_convs.0.conv')
    assert len(shared.tensors) == 3
    activations = [name for s in sets if s.kind == 'activation' for name in s.tensors]
    assert sorted(activations) == sorted(structure.activations)
