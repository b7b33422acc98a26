import copy

import pytest
import torch

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.wrapping.folding import fold_norms


@pytest.fixture(scope='module', params=['yolox', 'retinanet'])
def quantized(request):
    return request.param, *tiny_quantized(request.param)


@pytest.fixture(scope='module')
def retinanet():
    return tiny_quantized('retinanet')


def test_ranges_equal_brute_force(quantized):
    kind, detector, structure = quantized
    detector = copy.deepcopy(detector)
    batches = [tiny_batch(2, seed=3), tiny_batch(1, seed=4)]
    ranges = {}
    for name, quantizer in detector.ptq.activations.items():
        quantizer.set_range = lambda lo, hi, name=name: ranges.update({name: (lo, hi)})
    observe_activations(detector, batches, structure)

    folded = tiny_detector(kind)
    fold_norms(folded, structure.folds)
    seen = {layer.name: [] for layer in structure.layers}
    for layer in structure.layers:
        folded.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, args, name=layer.name: seen[name].append(args[0].clone())
        )
    with torch.no_grad():
        for batch in batches:
            predict(folded, batch)
    assert len(ranges) == len(structure.activations)
    for layer in structure.layers:
        calls = len(layer.inputs)
        assert len(seen[layer.name]) == calls * len(batches)
        for index, name in enumerate(layer.inputs):
            tensors = seen[layer.name][index::calls]
            rows = [
                t.transpose(0, 1).flatten(1) if structure.activations[name].spec['num_channels'] else t.reshape(1, -1)
                for t in tensors
            ]
            low = torch.cat(rows, 1).amin(1).clamp(max=0).reshape(ranges[name][0].shape)
            high = torch.cat(rows, 1).amax(1).clamp(min=0).reshape(ranges[name][1].shape)
            assert torch.equal(ranges[name][0], low) and torch.equal(ranges[name][1], high), name


def test_levels_have_their_own_ranges(retinanet):
    detector, structure = retinanet
    layer = next(layer for layer in structure.layers if layer.name == 'bbox_head.retina_reg')
    assert len({detector.ptq.activations[name].scale.item() for name in layer.inputs}) == 3


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_not_finite_activations_name_the_layer(retinanet, value):
    detector, structure = copy.deepcopy(retinanet)
    with torch.no_grad():
        detector.backbone.layer2[0].conv1.bias[0] = value
    with pytest.raises(PTQError, match=r'input of layer backbone\.layer2\.0\.conv2.*NaN or infinity'):
        observe_activations(detector, [tiny_batch(1)], structure)
    assert detector.ptq.mode == 'quantize'
    assert not detector.ptq.observers


def test_no_batch_is_an_error(retinanet):
    detector, structure = copy.deepcopy(retinanet)
    with pytest.raises(PTQError, match='activation .*calibration set empty'):
        observe_activations(detector, [], structure)
