"""Quantized tensors between the layers while the detector runs: that nothing else changes."""

import copy
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from dataflow_toys import outputs_of, same, toy
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mmdet_ptq.calibration.reconstruction.activation_store import ActivationStore
from mmdet_ptq.calibration.reconstruction.streams import FLOAT, QUANTIZED, Streams
from mmdet_ptq.calibration.reconstruction.units import find_passages, find_units
from mmdet_ptq.deploy import load_quantized_state, quantized_state, read_quantized, save_quantized, settle_biases
from mmdet_ptq.engine.global_stage.optim import train_only_quantization
from mmdet_ptq.predictions import needs_reference, predict_aligned
from mmdet_ptq.testing import KINDS, raw_outputs, tiny_batch, tiny_detector, tiny_model_cfg
from mmdet_ptq.testing.calibrated import predict
from mmdet_ptq.wrapping import (
    Structure,
    apply_structure,
    freeze_weights,
    quantization_mode,
    quantized_weights,
    set_mode,
)
from mmdet_ptq.wrapping.flow import carried
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.state import quantize_only
from mmdet_ptq.wrapping.weights import QuantizedWeight


class Check(TorchFunctionMode):
    """Whatever a layer, a sum or a concatenation reads between the layers is what its quantizer gives back."""

    def __init__(self, detector, sites) -> None:
        super().__init__()
        self.activations, self.seen = detector.ptq.activations, Counter()
        self.functions = {site['function'] for site in sites} - {'relu', 'hardtanh', 'batch_norm'}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        if name in self.functions:
            for x in [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if torch.is_tensor(t)]:
                quantizer = carried(x)
                if quantizer is not None:
                    self.see(name, quantizer, x)
        return func(*args, **(kwargs or {}))

    def see(self, reader, name, x):
        quantizer = self.activations[name]
        assert torch.equal(quantizer.decode(quantizer.encode(x)), x), (reader, name)
        low, high = quantizer.code_range
        assert high - low == 255
        self.seen[reader] += 1


@pytest.mark.parametrize(
    'kind, dataflow, functions',
    [
        ('retinanet', 'full', {'add'}),
        pytest.param('ssd', 'full', {'add'}, marks=pytest.mark.thorough),
        pytest.param('yolox', 'full', {'add', 'cat', 'mul'}, marks=pytest.mark.thorough),
        ('yolox', 'per_channel', {'add', 'cat', 'mul'}),
        pytest.param('rtmdet', 'full', {'add', 'cat', 'mul'}, marks=pytest.mark.thorough),
    ],
)
def test_every_tensor_between_layers_is_on_the_grid_of_its_quantizer(flowing, kind, dataflow, functions):
    detector, structure = copy.deepcopy(flowing(kind, dataflow))
    check = Check(detector, structure.sites)
    for layer in structure.layers:
        calls = iter(layer.inputs * 2)
        detector.get_submodule(layer.name).register_forward_pre_hook(
            lambda m, args, calls=calls: check.see('layer', next(calls), args[0])
        )
    freeze_weights(detector)
    with check:
        raw_outputs(detector)
    layers = sum(len(layer.inputs) for layer in structure.layers)
    assert check.seen['layer'] == layers and functions < set(check.seen)


@pytest.mark.parametrize('kind', KINDS)
def test_float_mode_is_the_folded_detector_exactly(flowing, kind):
    detector, structure = flowing(kind)
    folded = tiny_detector(kind)
    fold_norms(folded, structure.folds)
    with quantization_mode(detector, 'float'):
        assert same(raw_outputs(detector), raw_outputs(folded))
    assert not same(raw_outputs(detector), raw_outputs(folded))


@pytest.mark.parametrize('kind', KINDS)
def test_every_quantizer_runs_in_tensor_mode_and_in_predict_mode(flowing, kind):
    detector, structure = copy.deepcopy(flowing(kind))
    calls = Counter()
    for name, quantizer in detector.ptq.activations.items():
        quantizer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    raw_outputs(detector)
    tensor_mode, _ = dict(calls), calls.clear()
    with torch.no_grad():
        predict(detector, tiny_batch(2))
    assert set(tensor_mode) == set(structure.activations) and tensor_mode == calls
    # a quantizer that several producers share runs once for each of them, any other once
    shared = Counter(name for layer in structure.layers for name in layer.outputs)
    shared.update(site['activation'] for site in structure.sites if site['activation'])
    assert all(count == 1 or count <= shared[name] for name, count in calls.items())


def test_nothing_is_added_without_dataflow(quantized, monkeypatch):
    detector, structure = quantized('retinanet')
    assert detector.ptq.flow is None and 'forward' not in vars(detector)
    assert not structure.sites and not structure.module_calls and not any(outputs_of(structure).values())
    monkeypatch.setattr('mmdet_ptq.wrapping.flow.Dataflow.running', None)
    raw_outputs(detector)


@pytest.mark.parametrize('kind', ['retinanet', 'rtmdet'])
def test_deep_copy_is_independent(flowing, kind):
    detector, structure = flowing(kind)
    before = raw_outputs(detector)
    other = copy.deepcopy(detector)
    assert same(raw_outputs(other), before)
    name = (
        next(site['activation'] for site in structure.sites if site['observes'])
        if kind == 'rtmdet'
        else 'neck/lateral_convs/0/conv:out'
    )
    with torch.no_grad():
        other.ptq.activations[name].scale.mul_(4)
    assert not same(raw_outputs(other), before) and same(raw_outputs(detector), before)
    set_mode(other, 'float')
    assert same(raw_outputs(detector), before)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_mode_behind(flowing, error):
    detector = copy.deepcopy(flowing('retinanet')[0])
    before = raw_outputs(detector)

    def fail(*_):
        raise error

    handle = detector.neck.fpn_convs[0].register_forward_pre_hook(fail)
    with pytest.raises(error):
        raw_outputs(detector)
    assert torch._C._len_torch_function_stack() == 0 and not detector.ptq.flow.frames.stack
    handle.remove()
    assert same(raw_outputs(detector), before)


def test_quantize_only(flowing):
    detector, structure = copy.deepcopy(flowing('rtmdet'))
    with quantization_mode(detector, 'float'):
        plain = raw_outputs(detector)
    with quantize_only(detector, [], []):
        assert same(raw_outputs(detector), plain)
    with quantize_only(detector, structure.activations, [layer.name for layer in structure.layers]):
        assert same(raw_outputs(detector), raw_outputs(detector))
    gate = next(name for name, entry in structure.activations.items() if entry.range)
    own = next(site['activation'] for site in structure.sites if site['observes'])
    counts = Counter()
    for name, quantizer in detector.ptq.activations.items():
        quantizer.register_forward_hook(lambda *_, name=name: counts.update([name]))
    for name in (gate, own):
        counts.clear()
        with quantize_only(detector, [name], []):
            assert not same(raw_outputs(detector), plain)
        assert counts == {name: 1}


@pytest.mark.parametrize('kind', ['retinanet', 'ssd', 'rtmdet', 'faster_rcnn'])
def test_units_that_run_by_themselves_do_what_they_do_in_the_whole(flowing, kind, tmp_path):
    detector = copy.deepcopy(flowing(kind)[0])
    detector.requires_grad_(False)
    data = detector.data_preprocessor(tiny_batch(2), False)
    images = data['inputs'][:1].clone().requires_grad_()
    with quantization_mode(detector, 'float'):

        def run():
            predict_aligned(detector, images, data['data_samples'][:1])

        units = find_units(detector, run)
        passages = find_passages(detector, run, units)
    streams = Streams(detector, units, ActivationStore(2**30, tmp_path), passages)
    streams.add(data, needs_reference(detector))
    seen = {}
    handles = [
        detector.get_submodule(unit.name).register_forward_hook(
            lambda m, args, out, name=unit.name: seen.setdefault(name, []).append(out.clone())
        )
        for unit in units
    ]
    with torch.no_grad():
        predict_aligned(detector, data['inputs'], data['data_samples'], reference=streams.batches[0].reference)
    for handle in handles:
        handle.remove()
    for unit in units:
        streams.collect(unit, FLOAT)
        inputs = streams.collect(unit, QUANTIZED)
        for call in range(unit.calls):
            with torch.no_grad():
                out = streams.run(unit, call, inputs[call][0], streams.tensors(inputs[call][0]))
            assert torch.equal(out, seen[unit.name][call]), (unit.name, call)
        streams.finish(unit, inputs)


@pytest.mark.parametrize('kind', ['ssd', 'retinanet', 'rtmdet'])
def test_gradients_reach_the_scales(flowing, kind):
    detector, structure = copy.deepcopy(flowing(kind))
    rates = dict.fromkeys(('scale', 'weight_scale', 'mu', 's', 'k', 'eps', 'weight', 'bias'), 1.0)
    train_only_quantization(detector, rates)
    data = detector.data_preprocessor(tiny_batch(2), False)
    for _ in range(2):
        detector.zero_grad()
        outputs = detector(**copy.deepcopy(data), mode='tensor')
        flat = [t for t in tree_leaves(outputs) if torch.is_tensor(t) and t.requires_grad]
        sum(t.square().sum() for t in flat).backward()
    for name, quantizer in detector.ptq.activations.items():
        if structure.activations[name].range:
            assert quantizer.scale.grad is None
        else:
            assert torch.isfinite(quantizer.scale.grad).all() and quantizer.scale.grad.any(), name


@pytest.mark.parametrize('dataflow', ['full', 'per_channel'])
def test_export(dataflow):
    def between(self, a, b):
        x = F.silu(a) + (b * b.sigmoid()).relu()
        return F.max_pool2d(torch.cat([x, F.hardswish(self.more(x))], 1), 2)

    detector, _, image = toy(between, dict(dataflow=dataflow), more=nn.Conv2d(4, 4, 1))
    detector.requires_grad_(False)
    freeze_weights(detector)
    whole, calls = nn.Sequential(detector), Counter()
    for name, quantizer in detector.ptq.activations.items():
        quantizer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        expected = whole(image)
        eager, _ = dict(calls), calls.clear()
        program = torch.export.export(whole, (image,), strict=False)
        # nothing is quantized a second time while tensors are traced
        times = {calls[name] / count for name, count in eager.items()}
        assert calls.keys() == eager.keys() and len(times) == 1
        torch.testing.assert_close(program.module()(image), expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ rebuilt from data


@pytest.mark.parametrize(
    'kind, dataflow',
    [('retinanet', 'full'), ('ssd', 'full'), ('yolox', 'per_channel'), ('rtmdet', 'full'), ('faster_rcnn', 'full')],
)
def test_state_dict_and_structure_rebuild_the_detector(flowing, kind, dataflow):
    detector, structure = flowing(kind, dataflow)
    other = tiny_detector(kind, seed=3)
    again = Structure.from_dict(json.loads(json.dumps(structure.to_dict())))
    apply_structure(other, again)
    other.load_state_dict(detector.state_dict())
    assert same(raw_outputs(other), raw_outputs(detector))


@pytest.mark.parametrize('kind', ['retinanet', 'rtmdet'])
def test_the_integer_checkpoint_is_bit_identical(flowing, kind, tmp_path):
    detector, structure = copy.deepcopy(flowing(kind))
    settle_biases(detector, structure)
    save_quantized(tmp_path / 'q.pth', quantized_state(detector, structure, dict(model=tiny_model_cfg(kind)), None))
    loaded = tiny_detector(kind, seed=5)
    assert load_quantized_state(loaded, read_quantized(tmp_path / 'q.pth')) == structure
    freeze_weights(detector)
    assert same(raw_outputs(loaded.eval()), raw_outputs(detector))


def test_structures_of_older_checkpoints_are_read(quantized):
    detector, structure = quantized('retinanet')
    data = structure.to_dict()
    for key in ('sites', 'module_calls', 'islands'):
        del data[key]
    for layer in data['layers']:
        del layer['outputs']
    other = tiny_detector('retinanet', seed=3)
    apply_structure(other, Structure.from_dict(data))
    other.load_state_dict(detector.state_dict())
    assert same(raw_outputs(other), raw_outputs(detector))


def test_weights_are_quantized_once_a_pass(flowing, monkeypatch):
    detector, calls, quantize = copy.deepcopy(flowing('retinanet')[0]), Counter(), QuantizedWeight._quantize

    def counted(self, weight):
        calls.update([id(self)])
        return quantize(self, weight)

    monkeypatch.setattr(QuantizedWeight, '_quantize', counted)
    raw_outputs(detector)
    assert calls == {id(w): 1 for w in quantized_weights(detector).values()}


class Kept(tuple):
    """Tensors with gradients, in a detector that can be copied all the same."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize(
    'act, channels, gate',
    [
        (nn.SiLU(), 4, 'silu'),
        (nn.Hardswish(), 4, 'hardswish'),
        (lambda x: x * x.sigmoid(), 4, 'sigmoid'),
        (nn.Sigmoid(), None, None),
        (nn.LeakyReLU(), 4, 'leaky_relu'),
        (nn.PReLU(4), 4, 'prelu'),
        (nn.Tanh(), 4, 'tanh'),
        (lambda x: x.sigmoid() + x, None, None),
        (lambda x: F.silu(x) + x, None, None),
        (lambda x: F.leaky_relu(x) + x, None, None),
    ],
)
def test_a_scale_per_channel_before_activation_functions(act, channels, gate):
    def between(self, a, b):
        active = self.act(a)
        self.seen = Kept((a, active))
        return active + b

    detector, structure, image = toy(between, dict(dataflow='per_channel'), act=act)
    entry = structure.activations['stem:out']
    assert entry.spec['num_channels'] == channels and entry.spec['shared_zero_point'] is (channels is not None)
    assert structure.activations['other:out'].spec['num_channels'] is None
    with quantization_mode(detector, 'float'):
        expected = detector(image)
    error = expected.sub(detector(image)).norm()
    assert error < 0.05 * expected.norm()
    plain = toy(between, act=act)[0]
    assert torch.equal(plain(image), detector(image)) is (channels is None)
    module = 'act' if isinstance(act, nn.Module) else ''
    assert structure.islands == (
        [] if gate is None else [dict(module=module, operation=gate, reason='its input has a scale per channel')]
    )
    if gate is not None:
        # computed in float between two quantizers
        assert not any(entry.range for entry in structure.activations.values())
        site = next(site for site in structure.sites if site['activation'] and site['function'] != 'add')
        assert site['gate'] is None
        quantizer, (before, after) = detector.ptq.activations, detector.seen
        assert torch.equal(quantizer['stem:out'](before), before)
        assert torch.equal(quantizer[site['activation']](act(before)), after)


@pytest.mark.parametrize('function', [F.mish, F.gelu, F.elu, F.softplus])
def test_a_scale_per_channel_before_functions_that_have_no_form_in_8_bits(function):
    _, structure, _ = toy(lambda self, a, b: function(a) + b, dict(dataflow='per_channel'))
    assert structure.activations['stem:out'].spec['num_channels'] == 4
    assert structure.islands[0] == dict(module='', operation=function.__name__, reason='no 8-bit form of it is known')


def test_a_float_gate_is_told_once_with_its_first_reason():
    class Twice(nn.Module):
        def forward(self, x):
            return F.silu(x)

    _, structure, _ = toy(lambda self, a, b: self.twice(a) + self.twice(b), dict(dataflow='per_channel'), twice=Twice())
    assert structure.islands == [dict(module='twice', operation='silu', reason='its input has a scale per channel')]
    _, structure, _ = toy(lambda self, a, b: F.silu(a).exp() + b, dict(dataflow='per_channel'))
    assert [(i['operation'], i['reason']) for i in structure.islands][:1] == [('silu', 'only float operations read it')]
