import copy

import pytest
import torch
from architectures import register
from torch import nn

from mmdet_ptq.analysis import layer_errors
from mmdet_ptq.calibration import correct_biases
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import raw_outputs, tiny_batch, tiny_quantized
from mmdet_ptq.wrapping import Structure, quantization_mode
from mmdet_ptq.wrapping.structure import LayerStructure

W4 = dict(preset='w8a8_observe', weights=dict(bits=4), activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')))


class Toy(nn.Module):
    """Two layers and an output layer that runs on two levels; ``wrong`` is the error of each layer's weight."""

    def __init__(self, wrong=0.0, bias=True):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.second = nn.Conv2d(4, 4, 1, bias=bias)
        self.out = nn.Conv2d(4, 3, 1)
        self.linear = nn.Linear(3, 2)
        self.data_preprocessor = lambda batch, training: batch
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            for layer in (self.first, self.second, self.out):
                layer.weight += wrong * torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1))
        self.double().eval()

    def features(self, x):
        return self.second(self.first(x).relu()).relu()

    def forward(self, inputs, data_samples=None, mode='predict'):
        x = self.features(inputs)
        levels = [self.out(x), self.out(x[..., ::2, ::2] * 3)]
        return levels, self.linear(levels[0].mean((2, 3)))


def _structure(*names):
    names = names or ('first', 'second', 'out', 'linear')
    return Structure(layers=[LayerStructure(name, '', '', 1, 1, weight={}, inputs=['x']) for name in names])


@pytest.fixture
def batches():
    return [dict(inputs=torch.randn(4, 2, 12, 12).double(), data_samples=None) for _ in range(3)]


def _means(toy, batches):
    """Mean per channel of both layers before the head."""
    x = torch.cat([b['inputs'] for b in batches])
    first = toy.first(x)
    return [t.mean((0, 2, 3)).detach() for t in (first, toy.second(first.relu()))]


def _distance(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('bias', [True, False])
def test_the_mean_shift_goes(batches, bias):
    reference, toy = Toy(bias=bias), Toy(wrong=0.2, bias=bias)
    wanted = _means(reference, batches)
    before = _distance(_means(toy, batches), wanted)
    done = correct_biases(toy, batches, _structure(), reference)
    # the layer before was not yet right when the first batches ran
    assert before > 0.3
    assert _distance(_means(toy, batches)[:1], wanted[:1]) < 1e-10
    assert _distance(_means(toy, batches), wanted) < 0.1 * before
    assert done.created == ([] if bias else ['second'])
    assert isinstance(toy.second.bias, nn.Parameter) and 'second.bias' in toy.state_dict()
    # a second call finds little that is left, and a third nothing at all
    again = correct_biases(toy, batches, _structure(), reference)
    assert max(shift.abs().max().item() for shift in again.shifts.values()) < 0.1 * before
    assert again.created == []


def test_one_batch_is_corrected_exactly(batches):
    reference, toy = Toy(), Toy(wrong=0.2)
    correct_biases(toy, batches[:1], _structure(), reference)
    assert _distance(_means(toy, batches[:1]), _means(reference, batches[:1])) < 1e-10
    again = correct_biases(toy, batches[:1], _structure(), reference)
    assert max(shift.abs().max().item() for shift in again.shifts.values()) < 1e-10


def test_calls_count_by_their_positions(batches):
    reference, toy = Toy(), Toy()
    with torch.no_grad():
        toy.out.weight *= 1.1
    done = correct_biases(toy, batches, _structure('out'), reference)
    x = toy.features(torch.cat([b['inputs'] for b in batches]))
    levels = [x, x[..., ::2, ::2] * 3]
    assert levels[0].shape[-1] == 10 and levels[1].shape[-1] == 5
    columns = torch.cat([level.movedim(1, 0).flatten(1) for level in levels], 1).mean(1)
    wanted = -0.1 * reference.out.weight[..., 0, 0] @ columns
    torch.testing.assert_close(done.shifts['out'], wanted.detach())


def test_only_what_is_quantized_and_not_excluded(batches):
    reference, toy = Toy(), Toy(wrong=0.2)
    structure = _structure()
    structure.layers[0].weight, structure.layers[0].inputs = None, [None]
    done = correct_biases(toy, batches, structure, reference, exclude=['out'])
    assert set(done.shifts) == {'second', 'linear'}
    assert torch.equal(toy.first.bias, reference.first.bias) and torch.equal(toy.out.bias, reference.out.bias)
    assert not torch.equal(toy.second.bias, reference.second.bias)


def test_layers_that_do_not_pair_are_named(batches, monkeypatch):
    lines = []
    monkeypatch.setattr('mmdet_ptq.calibration.bias_correction.print_log', lambda text, *_: lines.append(text))
    reference, toy = Toy(), Toy(wrong=0.2)
    reference.never = toy.never = nn.Linear(3, 3)
    inner = toy.features
    toy.features = lambda x: inner(x)[..., 1:]
    done = correct_biases(toy, batches, _structure('second', 'out', 'never'), reference)
    assert done.skipped == {
        'out': 'it sees another number of positions in the quantized detector',
        'never': 'it never ran on the calibration images',
    }
    assert set(done.shifts) == {'second'} and torch.equal(toy.out.bias, reference.out.bias)
    assert any('bias of out is not corrected: it sees another' in line for line in lines)


def test_no_image():
    with pytest.raises(PTQError, match='no calibration image'):
        correct_biases(Toy(), [], _structure())


@pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn', 'rtmdet'])
def test_detectors(kind):
    detector, structure = tiny_quantized(kind, W4)
    original = copy.deepcopy(detector)
    batch = tiny_batch(4, seed=3)
    before = {e.layer: e for e in layer_errors(original, detector, batch)}
    done = correct_biases(detector, [batch], structure)
    after = {e.layer: e for e in layer_errors(original, detector, batch)}
    assert done.skipped == {} and set(done.shifts) == set(before)
    assert bool(done.created) == (kind == 'rtmdet')

    def mean(values):
        values = [value for value in values if value is not None]
        return sum(values) / len(values)

    # what is left is the spread over levels, of which a shared layer can take back only the mean
    assert mean(e.mean_shift_share for e in after.values()) < 0.3 * mean(e.mean_shift_share for e in before.values())
    assert mean(e.sqnr_db for e in after.values()) > mean(e.sqnr_db for e in before.values())
    assert [len(m._forward_hooks) for m in detector.modules()] == [len(m._forward_hooks) for m in original.modules()]
    # the original in float mode is the reference a call gets by default
    again = copy.deepcopy(original)
    correct_biases(again, [batch], structure, reference=original)
    for a, b in zip(raw_outputs(again, batch), raw_outputs(detector, batch), strict=True):
        assert torch.equal(a, b)
    with quantization_mode(original, 'float'), quantization_mode(detector, 'float'):
        assert not torch.equal(raw_outputs(original, batch)[0], raw_outputs(detector, batch)[0])


@pytest.mark.parametrize('kind', ['cascade_rcnn', 'mask_rcnn'])
def test_every_stage_sees_the_same_boxes_in_both_detectors(kind, monkeypatch):
    register(monkeypatch)
    detector, structure = tiny_quantized(kind, W4)
    done = correct_biases(detector, [tiny_batch(2)], structure)
    assert not done.skipped and {'rpn_head.rpn_cls'} < set(done.shifts)
    assert sum(name.startswith('roi_head.') and bool(shift.any()) for name, shift in done.shifts.items()) >= 6
