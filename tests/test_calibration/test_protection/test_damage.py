import copy

import pytest
import torch

from mmdet_ptq.calibration.protection.damage import DamageMeter
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import raw_outputs, tiny_batch, tiny_quantized
from mmdet_ptq.wrapping import quantization_mode
from mmdet_ptq.wrapping.state import quantize_only


@pytest.fixture(scope='module')
def retinanet():
    return tiny_quantized('retinanet')


def test_nothing_quantized_does_no_damage(retinanet):
    meter = DamageMeter(*retinanet, [tiny_batch(2)])
    damage = meter.measure([], [], layers=['backbone.conv1'])
    assert damage == type(damage)(0.0, 0.0, 0.0, 0.0)
    assert meter.measure_all().loss > 0


def test_switch_quantizes_the_named_tensors_alone(retinanet):
    detector, structure = retinanet
    state = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    with quantization_mode(detector, 'float'):
        untouched = raw_outputs(detector)
    whole = raw_outputs(detector)
    with quantize_only(detector, [], []):
        assert all(torch.equal(a, b) for a, b in zip(raw_outputs(detector), untouched, strict=True))
    with quantize_only(detector, structure.activations, [layer.name for layer in structure.layers]):
        assert all(torch.equal(a, b) for a, b in zip(raw_outputs(detector), whole, strict=True))
    with quantize_only(detector, [], ['bbox_head.retina_cls']):
        outputs = raw_outputs(copy.deepcopy(detector))
    changed = [not torch.equal(a, b) for a, b in zip(outputs, untouched, strict=True)]
    assert changed == [True] * 3 + [False] * 3  # class scores of all levels, no box
    assert all(torch.equal(a, b) for a, b in zip(raw_outputs(detector), whole, strict=True))
    assert detector.state_dict().keys() == state.keys()


def test_output_error_equals_brute_force(retinanet):
    detector, structure = retinanet
    layer = next(layer for layer in structure.layers if layer.name == 'backbone.layer1.0.conv2')
    module, seen = detector.get_submodule(layer.name), []
    meter = DamageMeter(detector, structure, [tiny_batch(2)])
    for kinds in (([layer.inputs[0]], []), ([], [layer.name])):
        error = meter.measure(*kinds, layers=[layer.name]).output_error
        seen.clear()
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output.double()))
        with quantize_only(detector, *kinds):
            raw_outputs(detector)
        with quantize_only(detector, [], []):
            raw_outputs(detector)
        handle.remove()
        assert error == pytest.approx(((seen[0] - seen[1]).square().sum() / seen[1].square().sum()).item(), rel=1e-6)
        assert error > 0


def test_output_errors_of_all_activations_in_one_pass_are_those_of_each_alone(retinanet):
    detector, structure = retinanet
    meter = DamageMeter(detector, structure, [tiny_batch(2)])
    errors = meter.output_errors()
    assert errors.keys() == structure.activations.keys() and detector.ptq.mode == 'quantize'
    for layer in (structure.layers[3], structure.layers[-1]):
        name, readers = layer.inputs[-1], [x.name for x in structure.layers if layer.inputs[-1] in x.inputs]
        assert errors[name] == pytest.approx(meter.measure([name], [], layers=readers).output_error, rel=1e-3) != 0


def test_only_the_named_call_of_a_shared_layer_counts(retinanet):
    detector, structure = retinanet
    layer = next(layer for layer in structure.layers if layer.name == 'bbox_head.retina_cls')
    meter = DamageMeter(detector, structure, [tiny_batch(2)])
    errors = [meter.measure([name], [], layers=[layer.name]).output_error for name in layer.inputs]
    assert len(set(errors)) == 3 and min(errors) > 0


def test_boxes_that_overflow_have_a_finite_loss(retinanet):
    detector, structure = retinanet[0], retinanet[1]
    detector = copy.deepcopy(detector)
    meter = DamageMeter(detector, structure, [tiny_batch(2)])
    name = next(layer.inputs[0] for layer in structure.layers if layer.name == 'bbox_head.retina_reg')
    with torch.no_grad():
        detector.ptq.activations[name].scale.fill_(1e30)
    damage = meter.measure([name], [])
    assert 0 < damage.loss < 1e3 and 0 <= damage.iou_loss <= 1


def test_no_image_is_an_error(retinanet):
    with pytest.raises(PTQError, match='at least one calibration image'):
        DamageMeter(*retinanet, [])
