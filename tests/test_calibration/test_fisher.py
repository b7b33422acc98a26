"""Expected squared gradients of the detector's own log-likelihood, and the ranges that follow from them."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from mmdet_ptq.calibration import fisher, observe_activations
from mmdet_ptq.calibration.fisher import noisy_loss, weigh_activations
from mmdet_ptq.predictions import AlignedPredictions
from mmdet_ptq.quantizers import FisherObserver
from mmdet_ptq.testing import tiny_batch, tiny_quantized
from mmdet_ptq.wrapping import quantization_mode


def mean_outer_product(predictions: AlignedPredictions, inputs: torch.Tensor, monkeypatch) -> torch.Tensor:
    """Mean of gradient times gradient over every pattern of signs."""
    total, patterns = 0, list(itertools.product((-1.0, 1.0), repeat=inputs.numel()))
    for pattern in patterns:
        monkeypatch.setattr(fisher, '_signs', lambda like, pattern=pattern: torch.tensor(pattern).view(like.shape))
        (gradient,) = torch.autograd.grad(noisy_loss(predictions), inputs, retain_graph=True)
        total = total + torch.outer(gradient.flatten(), gradient.flatten())
    return total / len(patterns)


def test_scores_of_sigmoid_heads_have_the_covariance_of_labels_drawn_from_them(monkeypatch):
    logits = torch.tensor([[[-3.0, 0.5, 2.0], [0.0, -1.0, -6.0]]], requires_grad=True)
    found = mean_outer_product(AlignedPredictions(logits), logits, monkeypatch)
    p = logits.detach().sigmoid().flatten()
    torch.testing.assert_close(found, torch.diag(p * (1 - p)))


def test_scores_of_softmax_heads_have_the_covariance_of_labels_drawn_from_them(monkeypatch):
    logits = torch.tensor([[[-1.0, 0.5, 2.0, 0.1]]], requires_grad=True)
    found = mean_outer_product(AlignedPredictions(logits, activation='softmax'), logits, monkeypatch)
    p = logits.detach().softmax(-1).flatten()
    torch.testing.assert_close(found, torch.diag(p) - torch.outer(p, p))


def test_boxes_have_the_slope_of_their_own_term_at_the_deviation_of_reference():
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 40.0]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(noisy_loss(AlignedPredictions(torch.zeros(1, 1, 2), boxes)), boxes)
    size = torch.tensor([[[10.0, 40.0, 10.0, 40.0]]])
    slope_of_square = gradient.square() * fisher.BOX_DEVIATION * size
    away = (boxes.detach() + fisher.BOX_DEVIATION * size).requires_grad_()
    term = ((away - boxes.detach()) / size).abs().mean()
    torch.testing.assert_close(slope_of_square, torch.autograd.grad(term, away)[0])


@pytest.mark.parametrize('quality', [None, torch.full((1, 2), 9.0)])
def test_boxes_that_the_filter_drops_count_nothing(quality):
    logits = torch.tensor([[[-12.0, -13.0], [1.0, -2.0]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(noisy_loss(AlignedPredictions(logits, quality_logits=quality)), logits)
    assert (gradient[0, 0] == 0).all()
    assert (gradient[0, 1] != 0).all()


def test_raw_outputs_count_alike_in_units_of_their_spread():
    raw = torch.randn(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(noisy_loss(AlignedPredictions(None, raw=[raw])), raw)
    torch.testing.assert_close(gradient.abs(), (1 / raw.detach().std()).expand(2, 5))


class Recording(FisherObserver):
    """Keeps what it is told."""

    def weigh(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        self.told = [*getattr(self, 'told', []), (x, weight)]


@pytest.mark.parametrize('dataflow', [None, 'full'])
def test_weights_are_the_mean_squared_gradients_of_the_tensors_that_would_be_quantized(dataflow, monkeypatch):
    detector, structure = tiny_quantized('yolox', dict(preset='w8a8_observe', dataflow=dataflow))
    observers = {name: Recording() for name in detector.ptq.activations if structure.activations[name].range is None}
    detector.ptq.observers.update(observers)
    batch = tiny_batch(2)
    monkeypatch.setattr(fisher, 'WEIGHED_IMAGES', 1)
    weigh_activations(detector, observers, [copy.deepcopy(batch), copy.deepcopy(batch)])
    assert detector.ptq.recorded is None and detector.ptq.only is None and detector.ptq.mode == 'quantize'
    (last,) = next(layer.inputs for layer in structure.layers if layer.name == 'bbox_head.multi_level_conv_cls.0')
    ((x, weight),) = observers[last].told
    # by hand, at the input of a layer that writes scores: its weight times the gradient of the noise
    layer = detector.get_submodule('bbox_head.multi_level_conv_cls.0')
    with torch.no_grad(), quantization_mode(detector, 'float'):
        logits = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    assert x.shape[0] == 1 and weight.shape == x.shape and (weight >= 0).all() and weight.sum() > 0
    assert logits.shape[2:] == weight.shape[2:]
    again = {name: Recording() for name in observers}
    weigh_activations(detector, again, [copy.deepcopy(batch)])
    for name, observer in observers.items():
        for (x, weight), (same, as_much) in zip(observer.told, again[name].told, strict=True):
            assert torch.equal(x, same) and torch.equal(weight, as_much)


@pytest.mark.thorough
def test_a_head_without_gradients_leaves_ranges_and_says_so(monkeypatch):
    detector, structure = tiny_quantized('yolox', dict(preset='w8a8_observe'))

    def broken(*args):
        raise AttributeError('no gt_instances')

    monkeypatch.setattr(fisher, 'predict_aligned', broken)
    told = []
    monkeypatch.setattr(fisher, 'print_log', lambda text, *_: told.append(text))
    observe_activations(detector, [tiny_batch(2)], structure)
    assert 'all of them count alike' in told[0] and 'AttributeError: no gt_instances' in told[0]
    assert detector.ptq.recorded is None and detector.ptq.only is None and not detector.ptq.observers
    ranges = {name: q.scale.clone() for name, q in detector.ptq.activations.items()}
    for entry in structure.activations.values():
        entry.observer = dict(type='mmdet_ptq.MSEObserver')
    observe_activations(detector, [tiny_batch(2)], structure)
    for name, quantizer in detector.ptq.activations.items():
        assert torch.equal(ranges[name], quantizer.scale)


@pytest.mark.thorough
def test_an_image_whose_gradients_are_not_finite_is_left_out_and_told(monkeypatch):
    detector, structure = tiny_quantized('yolox', dict(preset='w8a8_observe'))
    predict, calls = fisher.predict_aligned, []

    def broken_first(*args):
        calls.append(args)
        predictions = predict(*args)
        return (
            replace(predictions, cls_logits=predictions.cls_logits * float('nan')) if len(calls) == 1 else predictions
        )

    monkeypatch.setattr(fisher, 'predict_aligned', broken_first)
    logged = []
    monkeypatch.setattr(fisher, 'print_log', lambda text, *_: logged.append(text))
    observe_activations(detector, [tiny_batch(2)], structure)
    assert 'on 1 of 2 images (PTQError: gradients are not finite)' in logged[0]
    assert all(torch.isfinite(q.scale).all() for q in detector.ptq.activations.values())


def test_tensors_that_are_written_to_in_place_are_weighed_as_they_were(monkeypatch):
    detector, structure = tiny_quantized('retinanet', dict(preset='w8a8_observe', dataflow='full'))
    observers = {name: Recording() for name, entry in structure.activations.items() if entry.range is None}
    detector.ptq.observers.update(observers)
    batch = tiny_batch(1)
    with torch.no_grad(), quantization_mode(detector, 'observe'):
        data = detector.data_preprocessor(copy.deepcopy(batch), False)
        detector(**data, mode='predict')
    weigh_activations(detector, observers, [batch])
    told = {name: observer for name, observer in observers.items() if hasattr(observer, 'told')}
    assert any(name.endswith(':out') for name in told)
    for name, observer in told.items():
        assert min(float(x.min()) for x, _ in observer.told) == float(observer.low.min()), name
        assert max(float(x.max()) for x, _ in observer.told) == float(observer.high.max()), name
