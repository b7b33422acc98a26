"""A format that is adopted gives the detector that its override would have prepared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from toy_formats import Toy, config, copies, image_batches, outputs, prepared, run_one, tensor_set

from mmdet_ptq.calibration.protection.adopt import adopt, overrides_for
from mmdet_ptq.calibration.protection.candidates import Candidate, candidates_for, observe_candidates, weight_policies
from mmdet_ptq.calibration.protection.sensitivity import ACTIVATION, WEIGHT, TensorSet
from mmdet_ptq.wrapping import Structure, apply_structure, quantized_weights


@pytest.fixture(scope='module')
def made() -> tuple[Toy, Structure]:
    return prepared(config(weights=dict(bits=4)))


def adopted(made, kind: str, layer: str, which: str) -> tuple[TensorSet, Candidate]:
    """Adopts a format in place."""
    detector, structure = made
    tensors = tensor_set(structure, kind, layer)
    policies = weight_policies(detector, structure, config(weights=dict(bits=4)), lambda: run_one(detector))
    candidate = candidates_for(detector, structure, tensors, [which], policies)[0]
    observe_candidates(detector, image_batches(), [candidate])
    adopt(detector, structure, tensors, candidate)
    return tensors, candidate


def assert_same(first: tuple[Toy, Structure], second: tuple[Toy, Structure]) -> None:
    assert first[1].to_dict() == second[1].to_dict()
    states = first[0].state_dict(), second[0].state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert torch.equal(outputs(first[0]), outputs(second[0]))


@pytest.mark.parametrize(
    'kind, layer, which',
    [
        (ACTIVATION, 'depthwise', 'per_channel'),
        (ACTIVATION, 'stem', 'range'),
        (ACTIVATION, 'one', '16bit'),  # read by two layers
        (ACTIVATION, 'one', 'float'),
        (ACTIVATION, 'bbox_head', 'lower'),
        (WEIGHT, 'two', '8bit'),
        (WEIGHT, 'two', 'format'),
        (WEIGHT, 'depthwise', 'range'),
        (WEIGHT, 'bbox_head', 'float'),
    ],
)
def test_it_is_as_if_it_had_been_prepared_so(made, kind, layer, which):
    changed = copies(made)
    tensors, candidate = adopted(changed, kind, layer, which)
    assert changed[1] != made[1] or not torch.equal(outputs(changed[0]), outputs(made[0]))
    overrides = overrides_for({tensors: candidate})
    assert_same(changed, prepared(config(weights=dict(bits=4), overrides=overrides)))


def test_several_formats_one_after_another_are_rebuilt_from_the_structure(made):
    detector, structure = copies(made)
    for kind, layer, which in (
        (WEIGHT, 'one', 'float'),
        (ACTIVATION, 'one', 'float'),
        (ACTIVATION, 'depthwise', 'per_channel'),
        (WEIGHT, 'two', '8bit'),
    ):
        adopted((detector, structure), kind, layer, which)
    rebuilt = copy.deepcopy(Toy().eval())
    apply_structure(rebuilt, Structure.from_dict(structure.to_dict()))
    rebuilt.load_state_dict(detector.state_dict())
    assert torch.equal(outputs(rebuilt), outputs(detector))
    layers = {layer.name: layer for layer in structure.layers}
    assert layers['one'].reason == 'its input is left float by the policy' and layers['one'].inputs == [None]
    assert layers['two'].inputs == [None] and not layers['two'].integer and layers['depthwise'].integer


def test_layers_in_float_compute_what_they_did_before_quantization(made):
    detector, structure = copies(made)
    for layer in ('stem', 'depthwise', 'one', 'two', 'bbox_head'):
        adopted((detector, structure), WEIGHT, layer, 'float')
    for layer in ('stem', 'depthwise', 'one', 'bbox_head'):
        adopted((detector, structure), ACTIVATION, layer, 'float')
    assert quantized_weights(detector) == {} and len(detector.ptq.activations) == 0
    assert not structure.activations and not any(layer.integer or layer.weight for layer in structure.layers)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Toy().eval()
    torch.testing.assert_close(outputs(detector), outputs(plain), rtol=1e-5, atol=1e-6)


def test_a_copy_made_before_stays_quantized(made):
    detector, structure = copies(made)
    twin = copy.deepcopy(detector)
    shown = outputs(twin)
    adopted((detector, structure), WEIGHT, 'two', 'float')
    assert type(detector.two) is nn.Conv2d and isinstance(detector.two.weight, nn.Parameter)
    assert 'two' in quantized_weights(twin) and torch.equal(outputs(twin), shown)
    assert not torch.equal(detector.two.weight, twin.two.weight)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_what_else_is_done_to_a_weight_is_done_in_float_too(made):
    detector, structure = copies(made)
    parametrize.register_parametrization(detector.two, 'weight', Doubled())
    original = detector.two.parametrizations.weight.original.detach().clone()
    adopted((detector, structure), WEIGHT, 'two', 'float')
    assert 'two' not in quantized_weights(detector)
    torch.testing.assert_close(detector.two.weight.detach(), 2 * original)


def test_overrides_name_the_layers_and_join_what_is_said_of_one():
    log = Candidate('format', '', dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer')), {})
    wide, gone = Candidate('16bit', '', dict(bits=16), {}), Candidate('float', '', dict(float=True), {})
    chosen = {
        TensorSet(ACTIVATION, ('x', 'y'), ('a', 'b')): wide,
        TensorSet(WEIGHT, ('b',), ('b',)): log,
        TensorSet(WEIGHT, ('c',), ('c',)): gone,
    }
    found = overrides_for(chosen)
    assert found == {
        'a': dict(activations=dict(bits=16)),
        'b': dict(activations=dict(bits=16), weights=dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer'))),
        'c': dict(weights=dict(float=True)),
    }
    # none is part of another, or of the candidate
    found['b']['activations']['bits'] = found['b']['weights']['quantizer']['type'] = 0
    assert overrides_for(chosen)['b']['weights']['quantizer']['type'] == 'mmdet_ptq.LogAffineQuantizer'
    assert found['a'] == dict(activations=dict(bits=16)) and wide.change == dict(bits=16)
    assert overrides_for({}) == {}
