import torch

from mmdet_ptq.deploy import integer_weight, settle_biases
from mmdet_ptq.testing import tiny_quantized
from mmdet_ptq.wrapping import float_weight, quantized_weights


def test_biases_lie_on_the_grid_of_the_accumulator():
    detector, structure = tiny_quantized('retinanet')
    before = {layer.name: detector.get_submodule(layer.name).bias.detach().clone() for layer in structure.layers}
    settled = settle_biases(detector, structure)
    weights = quantized_weights(detector)
    moved = 0
    for layer in structure.layers:
        module = detector.get_submodule(layer.name)
        if len(set(layer.inputs)) > 1:
            # several levels: several grids
            assert layer.name not in settled and torch.equal(module.bias, before[layer.name])
            continue
        assert layer.name in settled
        weight = integer_weight(weights[layer.name].quantizer, weights[layer.name].codes(float_weight(module)))
        step = detector.ptq.activations[layer.inputs[0]].positive_scale() * weight.scale
        codes = module.bias / step
        torch.testing.assert_close(codes, codes.round(), rtol=1e-6, atol=1e-3)
        assert ((module.bias - before[layer.name]).abs() <= 0.5001 * step).all()
        moved += not torch.equal(module.bias, before[layer.name])
    assert moved > 5
    kept = {name: detector.get_submodule(name).bias.detach().clone() for name in settled}
    settle_biases(detector, structure)
    assert all(torch.equal(detector.get_submodule(name).bias, value) for name, value in kept.items())


def test_integers_times_scale_are_the_quantized_weight():
    detector, _ = tiny_quantized('retinanet', dict(preset='w4a8', activations=dict(
        observer=dict(type='mmdet_ptq.MinMaxObserver'))))
    for name, quantized in quantized_weights(detector).items():
        layer = detector.get_submodule(name)
        weight = integer_weight(quantized.quantizer, quantized.codes(float_weight(layer)))
        assert weight.fits_int8 and weight.scale.shape == (len(weight.codes), )
        assert torch.equal(quantized.layout.from_rows(weight.values(), layer.weight.shape), layer.weight)
