"""The structure: plain data that rebuilds a quantized detector, and refuses what it was not made for."""

import copy
import json

import pytest
import torch

from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import KINDS, raw_outputs, tiny_detector
from mmdet_ptq.wrapping import Structure, apply_structure
from mmdet_ptq.wrapping.structure import LayerStructure, disable_checkpointing


@pytest.mark.parametrize('kind', KINDS)
def test_a_detector_is_rebuilt_from_plain_data(kind, quantized):
    detector, structure = quantized(kind)
    # nothing but what JSON knows
    told = json.loads(json.dumps(structure.to_dict()))
    twin = tiny_detector(kind, seed=5)
    apply_structure(twin, Structure.from_dict(told))
    twin.load_state_dict(detector.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(raw_outputs(twin), raw_outputs(detector), strict=True):
            assert torch.equal(ours, theirs)


def test_a_quantized_detector_is_not_quantized_again(quantized):
    detector, structure = quantized('retinanet')
    with pytest.raises(PTQError, match='already quantized'):
        apply_structure(copy.deepcopy(detector), structure)


def test_a_detector_without_the_layers_is_refused_before_it_is_changed(quantized):
    _, structure = quantized('retinanet')
    stranger = tiny_detector('yolox')
    before = set(stranger.state_dict())
    with pytest.raises(PTQError, match=r'lacks \d+ layers of the quantized checkpoint, first '):
        apply_structure(stranger, Structure(layers=structure.layers))
    assert set(stranger.state_dict()) == before


@pytest.mark.parametrize(
    ('weight', 'inputs', 'integer'),
    [(dict(bits=8), ['x'], True), (None, ['x'], False), (dict(bits=8), [], False), (dict(bits=8), ['x', None], False)],
)
def test_a_layer_computes_in_integers_if_its_weight_and_every_input_do(weight, inputs, integer):
    assert LayerStructure('a', 'linear', 'neck', 1, 1, weight, inputs).integer is integer


def test_recomputed_calls_are_switched_off():
    detector = tiny_detector('retinanet')
    detector.backbone.layer1[0].with_cp = True
    disable_checkpointing(detector)
    assert not detector.backbone.layer1[0].with_cp
