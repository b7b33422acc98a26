"""Quantized tensors between the layers: which ones, and that nothing else changes."""
import copy
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.calibration.activation_store import ActivationStore
from mmdet_ptq.calibration.streams import FLOAT, QUANTIZED, Streams
from mmdet_ptq.calibration.units import find_units
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import load_quantized_state, quantized_state, read_quantized, save_quantized
from mmdet_ptq.engine.optim import train_only_quantization
from mmdet_ptq.predictions import predict_aligned
from mmdet_ptq.predictions.two_stage import is_two_stage
from mmdet_ptq.testing import KINDS, raw_outputs, tiny_batch, tiny_detector, tiny_model_cfg
from mmdet_ptq.testing.calibrated import OBSERVE, predict
from mmdet_ptq.wrapping import (
    Structure,
    apply_structure,
    freeze_weights,
    prepare_detector,
    quantization_mode,
    quantized_weights,
    set_mode,
)
from mmdet_ptq.wrapping.flow import carried
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.inputs import quantize_only
from mmdet_ptq.wrapping.weights import QuantizedWeight

FULL = {**OBSERVE, 'dataflow': 'full'}


@pytest.fixture(autouse=True)
def no_mode_is_left():
    yield
    assert torch._C._len_torch_function_stack() == 0


@pytest.fixture(scope='session')
def flowing(quantized):
    """Builds each tiny detector with each dataflow once."""
    built = {}

    def get(kind, dataflow='full'):
        if (kind, dataflow) not in built:
            detector = tiny_detector(kind)
            structure = prepare_detector(detector, PTQConfig.from_dict({**FULL, 'dataflow': dataflow}),
                                         lambda: predict(detector, tiny_batch(1)))
            observe_activations(detector, [tiny_batch(2, seed=1)], structure)
            built[kind, dataflow] = detector, structure
        return built[kind, dataflow]

    return get


def same(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def outputs_of(structure):
    return {layer.name: layer.outputs for layer in structure.layers}


def inputs_of(structure):
    return {layer.name: layer.inputs for layer in structure.layers}


def sites_in(structure, module):
    return {(site['function'], site['index']): site['activation'] for site in structure.sites
            if site['module'] == module and site['activation']}


# ------------------------------------------------------------------ a detector of one's own


class Toy(nn.Module):
    """A backbone given as a function between two convolutions and an output layer."""

    def __init__(self, between, **layers) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(3, 4, 3, padding=1)
        self.between = between
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.bbox_head = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyConv2d(2, 1))
        self.data_preprocessor = lambda batch, training: batch
        self(torch.zeros(1, 3, 8, 8))

    def forward(self, inputs, data_samples=None, mode='predict'):
        return self.bbox_head(self.between(self, self.stem(inputs), self.other(inputs)))


def toy(between, ptq=None, **layers):
    torch.manual_seed(0)
    detector = Toy(between, **layers).eval()
    image = torch.randn(2, 3, 8, 8)
    structure = prepare_detector(detector, PTQConfig.from_dict({**FULL, **(ptq or {})}), lambda: detector(image))
    observe_activations(detector, [dict(inputs=image)], structure)
    return detector, structure, image


READ = 'bbox_head/0'  # the quantizer of what the head reads
OUT = 'bbox_head/1:out'  # and of what it puts out


def test_movements_share_the_quantizer_of_the_tensor_they_make_and_change_nothing():
    def between(self, a, b):
        x = F.interpolate(torch.cat([a.relu(), F.relu6(b)], 1), scale_factor=2)
        return F.pad(F.max_pool2d(x, 2).flatten(2).unflatten(2, (8, 8)), (0, 1))

    detector, structure, image = toy(between)
    assert {site['activation'] for site in structure.sites} == {READ}
    assert structure.activations.keys() == {'stem', READ, 'bbox_head/1', OUT} and not structure.islands
    assert outputs_of(structure) == {'stem': [], 'other': [], 'bbox_head.0': ['bbox_head/1'], 'bbox_head.1': [OUT]}
    counts = Counter()
    detector.ptq.activations[READ].register_forward_hook(lambda *_: counts.update([READ]))
    plain, _, _ = toy(between, dict(dataflow=None))
    # what lies inside the head is quantized where it is computed instead of where it is read
    assert torch.equal(detector(image), detector.ptq.activations[OUT](plain(image)))
    assert counts == {READ: 2}


@pytest.mark.parametrize('between, own', [
    (lambda self, a, b: a + b, {'stem:out', 'other:out'}),
    (lambda self, a, b: (a + b).relu(), {'stem:out', 'other:out'}),
    (lambda self, a, b: a.sigmoid() * b, {'stem:out', 'other:out', ':sigmoid'}),
    (lambda self, a, b: F.silu(a, inplace=True) - b, {'stem:out', 'other:out', ':silu', ':silu/sigmoid'}),
    (lambda self, a, b: F.hardswish(a) + F.relu(b), {'stem:out', ':relu', ':hardswish', ':hardswish/hardsigmoid'}),
    (lambda self, a, b: F.leaky_relu(a) + F.avg_pool2d(b, 3, 1, 1),
     {'stem:out', 'other:out', ':leaky_relu', ':avg_pool2d'}),
    (lambda self, a, b: F.interpolate(a, scale_factor=2) + F.interpolate(b, scale_factor=2, mode='bilinear'),
     {'stem:out', 'other:out', ':interpolate-1'}),
    # a sum of joined tensors: they share the scale of what they are joined into
    (lambda self, a, b: torch.cat([a, b], 1) + 1.0, {':cat'}),
    # two tensors of different scales are read by two operations: no sharing
    (lambda self, a, b: torch.cat([a, a + b], 1), {'stem:out', 'other:out'}),
])
def test_each_tensor_between_the_layers_has_one_quantizer(between, own):
    detector, structure, image = toy(between)
    assert set(structure.activations) - {'stem', READ, 'bbox_head/1', OUT} == own
    assert not structure.islands
    for name in own:
        fixed = name.endswith('sigmoid')
        assert (structure.activations[name].get('range') == [0.0, 1.0]) is fixed
        scale = detector.ptq.activations[name].scale
        assert scale == torch.tensor(1 / 255) if fixed else scale not in (1, 1 / 255)
        assert scale.requires_grad is not fixed
    with quantization_mode(detector, 'float'):
        expected = detector(image)
    assert expected.sub(detector(image)).norm() < 0.05 * expected.norm()


def test_float_islands_are_named_and_the_layers_around_them_stay_in_integers(monkeypatch):
    lines = []
    monkeypatch.setattr('mmdet_ptq.wrapping.dataflow.print_log', lambda text, *_: lines.append(text))
    _, structure, _ = toy(lambda self, a, b: self.act(a).tanh() + (b * 2).exp(), act=nn.Mish())
    assert [(i['module'], i['operation']) for i in structure.islands] == [
        ('act', 'mish'), ('', 'tanh'), ('', 'mul'), ('', 'exp'), ('', 'add')]
    assert [i['reason'] for i in structure.islands][1:3] == ['float operations stand before it',
                                                            'only float operations read it']
    assert 'operation mish stays float, no 8-bit form of it is known: act' in lines
    assert 'operation tanh stays float, float operations stand before it: (the detector itself)' in lines
    assert outputs_of(structure)['stem'] == ['stem:out'] and outputs_of(structure)['other'] == ['other:out']
    assert not structure.sites


def test_a_scale_per_channel_stays_behind_what_moves_channels():
    layers = dict(depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8))
    _, structure, _ = toy(lambda self, a, b: self.depthwise(torch.cat([a, b], 1)), **layers)
    assert structure.activations['depthwise']['spec']['num_channels'] == 8
    assert outputs_of(structure)['stem'] == ['stem:out'] and outputs_of(structure)['other'] == ['other:out']
    # but through a pooling it goes
    _, structure, _ = toy(lambda self, a, b: self.depthwise(F.max_pool2d(a, 2)),
                          depthwise=nn.Conv2d(4, 4, 3, padding=1, groups=4))
    assert structure.activations['depthwise']['spec']['num_channels'] == 4
    assert outputs_of(structure)['stem'] == ['depthwise']
    # what others read, too, has one scale
    _, structure, _ = toy(lambda self, a, b: self.depthwise(a) + a, depthwise=nn.Conv2d(4, 4, 3, padding=1, groups=4))
    assert structure.activations['depthwise']['spec']['num_channels'] is None


@pytest.mark.parametrize('activations, bits, symmetric', [
    (dict(bits=4), 8, False), (dict(bits=16), 16, False),
    (dict(quantizer=dict(type='mmdet_ptq.AffineQuantizer', symmetric=True)), 8, True)])
def test_formats(activations, bits, symmetric):
    _, structure, _ = toy(lambda self, a, b: F.silu(a) + b, dict(activations=OBSERVE['activations'] | activations))
    specs = {name: entry['spec'] for name, entry in structure.activations.items()}
    for name in ('stem:out', ':silu', ':silu/sigmoid'):
        assert (specs[name]['bits'], specs[name]['symmetric'], specs[name]['num_channels']) == (bits, symmetric, None)
    assert specs[READ]['bits'] == activations.get('bits', 8)


def test_what_is_changed_in_place_and_read_under_its_old_name_is_an_island():
    def between(self, a, b):
        a.add_(b)
        return a + b

    detector, structure, image = toy(between)
    assert structure.islands[0] == dict(
        module='', operation='add_', reason='it changes a tensor in place that is read under its old name')
    assert outputs_of(structure)['stem'] == [] and outputs_of(structure)['other'] == ['other:out']
    with quantization_mode(detector, 'float'):
        expected = detector(image)
    # with gradients, for which nothing may be overwritten that is needed later
    assert expected.sub(detector(image)).norm() < 0.05 * expected.norm()
    _, structure, _ = toy(lambda self, a, b: a.add_(b) + b)
    assert sites_in(structure, '') == {('add_', 0): ':add_', ('add', 0): READ}


def test_a_module_of_the_users_that_is_called_twice_has_a_quantizer_per_call():
    class Twice(nn.Module):
        def forward(self, x):
            return F.silu(F.silu(x))

    _, structure, _ = toy(lambda self, a, b: self.twice(a) + self.twice(b), twice=Twice())
    found = [(site['call'], site['index'], site['activation']) for site in structure.sites if site['module'] == 'twice']
    assert found == [(0, 0, 'twice:silu#0'), (0, 1, 'twice:silu-1#0'), (1, 0, 'twice:silu#1'), (1, 1, 'twice:silu-1#1')]
    assert structure.module_calls == {'': 1, 'twice': 2}


def test_layers_left_float_are_not_between():
    _, structure, _ = toy(lambda self, a, b: a + b, dict(overrides={'stem': 'float'}))
    assert outputs_of(structure) == {
        'stem': [], 'other': ['other:out'], 'bbox_head.0': ['bbox_head/1'], 'bbox_head.1': [OUT]}
    _, structure, _ = toy(lambda self, a, b: a + b, dict(head='float'))
    assert not any(outputs_of(structure).values()) and not structure.sites
    _, structure, _ = toy(lambda self, a, b: a + b, dict(head='float_outputs'))
    assert outputs_of(structure)['bbox_head.0'] == outputs_of(structure)['bbox_head.1'] == []


@pytest.mark.parametrize('dataflow', ['full', 'per_channel'])
@pytest.mark.parametrize('symmetric', [False, True])
def test_what_the_heads_put_out_has_a_scale_per_channel(dataflow, symmetric):
    quantizer = dict(type='mmdet_ptq.AffineQuantizer', symmetric=symmetric)
    detector, structure, image = toy(lambda self, a, b: a + b, dict(
        dataflow=dataflow, activations=OBSERVE['activations'] | dict(bits=4, quantizer=quantizer)))
    spec = structure.activations[OUT]['spec']
    assert (spec['bits'], spec['num_channels'], spec['channel_axis']) == (8, 2, 1)
    assert spec['shared_zero_point'] is not symmetric and spec['symmetric'] is symmetric
    quantizer, seen = detector.ptq.activations[OUT], []
    assert quantizer.scale[0] != quantizer.scale[1] and quantizer.zero_point.unique().numel() == 1
    quantizer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    out = detector(image)
    assert len(seen) == 1 and not torch.equal(seen[0], out)
    assert torch.equal(quantizer.decode(quantizer.encode(seen[0])), out)


@pytest.mark.parametrize('act, operation', [
    (nn.Mish(inplace=True), 'mish'), (nn.ReLU6(inplace=True), 'hardtanh'), (nn.SiLU(inplace=True), 'silu'),
    (torch.sigmoid_, 'sigmoid_'), (lambda x: x.mul_(2).relu_(), 'relu_')])
def test_operations_in_place_leave_what_gradients_need(act, operation):
    def between(self, a, b):
        a = self.act(a + b)
        a += b
        return F.relu(a, inplace=True)

    detector, structure, image = toy(between, act=act)
    assert operation in {site['function'] for site in structure.sites}
    detector(image).square().sum().backward()
    for name, quantizer in detector.ptq.activations.items():
        assert 'range' in structure.activations[name] or quantizer.scale.grad.any(), name
    with torch.no_grad():
        quiet = detector(image)
    torch.testing.assert_close(quiet, detector(image))


# ------------------------------------------------------------------ mmdet's blocks


def test_residual_block_pyramid_and_pooling(flowing):
    _, structure = flowing('retinanet')
    inputs, outputs = inputs_of(structure), outputs_of(structure)
    # stem: its ReLU is fused, the pooling behind it moves values, so all is the first block's input
    assert outputs['backbone.conv1'] == []
    assert sites_in(structure, 'backbone.relu') == {('relu', 0): 'backbone/layer1/0/conv1'}
    # both addends; the sum is fused with its ReLU, which the next layer reads
    block = 'backbone.layer2.0'
    assert outputs[f'{block}.conv1'] == [] and outputs[f'{block}.conv2'] == ['backbone/layer2/0/conv2:out']
    assert outputs[f'{block}.downsample.0'] == ['backbone/layer2/0/downsample/0:out']
    assert sites_in(structure, block) == {}
    relus = [site for site in structure.sites if site['module'] == f'{block}.relu']
    assert [(site['call'], site['activation']) for site in relus] == [
        (0, inputs[f'{block}.conv2'][0]), (1, inputs['backbone.layer2.1.conv1'][0])]
    # pyramid: the upsampled level and the lateral one, and their sum
    assert outputs['neck.lateral_convs.0.conv'] == ['neck/lateral_convs/0/conv:out']
    assert outputs['neck.lateral_convs.1.conv'] == inputs['neck.fpn_convs.1.conv']
    assert sites_in(structure, 'neck') == {('add', 0): inputs['neck.fpn_convs.0.conv'][0]}
    # one range per level in the head, and of what it puts out
    relus = [site['activation'] for site in structure.sites if site['module'] == 'bbox_head.cls_convs.0.activate']
    assert relus == inputs['bbox_head.retina_cls'] and len(set(relus)) == 3
    for name in ('retina_cls', 'retina_reg'):
        assert outputs[f'bbox_head.{name}'] == [f'bbox_head/{name}:out#{level}' for level in range(3)]
    assert not structure.islands


def test_inverted_residual_block(flowing):
    _, structure = flowing('ssd')
    inputs, outputs = inputs_of(structure), outputs_of(structure)
    block = 'backbone.layer3.1'
    assert outputs[f'{block}.expand_conv.conv'] == outputs[f'{block}.depthwise_conv.conv'] == []
    assert sites_in(structure, f'{block}.expand_conv.activate') == {
        ('hardtanh', 0): inputs[f'{block}.depthwise_conv.conv'][0]}
    assert structure.activations[inputs[f'{block}.depthwise_conv.conv'][0]]['spec']['num_channels'] is not None
    assert outputs[f'{block}.linear_conv.conv'] == ['backbone/layer3/1/linear_conv/conv:out']
    assert sites_in(structure, block) == {('add', 0): inputs['backbone.layer3.2.expand_conv.conv'][0]}
    # what the next layer reads and what is added to is one tensor
    assert outputs['backbone.layer2.0.linear_conv.conv'] == inputs['backbone.layer2.1.expand_conv.conv']
    assert not structure.islands


def test_partial_stage_with_silu_and_concatenation(flowing):
    _, structure = flowing('yolox')
    inputs, outputs = inputs_of(structure), outputs_of(structure)
    stage = 'backbone.stage2.1'
    joined = inputs[f'{stage}.final_conv.conv'][0]
    assert sites_in(structure, stage) == {('cat', 0): joined}
    assert sites_in(structure, f'{stage}.short_conv.activate')['mul', 0] == joined
    assert sites_in(structure, f'{stage}.blocks.2') == {('add', 0): joined}
    assert outputs[f'{stage}.short_conv.conv'] == ['backbone/stage2/1/short_conv/conv:out']
    gate = sites_in(structure, f'{stage}.short_conv.activate')['sigmoid', 0]
    assert structure.activations[gate]['range'] == [0.0, 1.0]
    # spatial pyramid pooling moves values
    pool = 'backbone.stage4.1'
    assert sites_in(structure, f'{pool}.conv1.activate')['mul', 0] == inputs[f'{pool}.conv2.conv'][0]
    # the image is nobody's output, and Swish is a product of quantized factors
    assert not sites_in(structure, 'backbone.stem') and not structure.islands


def test_per_channel_dataflow_leaves_swish_in_float(flowing):
    detector, structure = flowing('yolox', 'per_channel')
    full = flowing('yolox')[1]
    gates = {(site['module'], site['function']) for site in full.sites if site['function'] == 'sigmoid'}
    assert gates == {(i['module'], i['operation']) for i in structure.islands} and len(gates) > 20
    assert {i['reason'] for i in structure.islands} == {'its input has a scale per channel'}
    assert not any('range' in entry for entry in structure.activations.values())
    # all else is as in the full dataflow
    assert [site for site in structure.sites if site['activation']] == [
        site for site in full.sites if site['activation'] and site['function'] != 'sigmoid']
    assert outputs_of(structure) == outputs_of(full)
    for layer in structure.layers:
        for name in layer.outputs:
            module, quantizer = detector.get_submodule(layer.name), detector.ptq.activations[name]
            assert quantizer.num_channels == module.out_channels and quantizer.zero_point.unique().numel() == 1
    # one scale per tensor in the full dataflow, but for what the heads put out
    assert {name for layer in full.layers for name in layer.outputs if full.activations[name]['spec']['num_channels']
            } == {f'bbox_head/multi_level_conv_{kind}/{level}:out' for kind in ('cls', 'reg', 'obj')
                  for level in range(3)}


def test_what_stays_float_in_tiny_detectors(flowing):
    # one normalisation per level after a shared convolution
    assert {i['operation'] for i in flowing('rtmdet')[1].islands} == {'batch_norm', 'silu'}
    islands = flowing('faster_rcnn')[1].islands
    assert 'RoIAlignFunction' in {i['operation'] for i in islands}
    assert {i['module'] for i in islands} == {'roi_head.bbox_roi_extractor'}


# ------------------------------------------------------------------ the forward pass


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


@pytest.mark.parametrize('kind, dataflow, functions', [
    ('retinanet', 'full', {'add'}), ('ssd', 'full', {'add'}), ('yolox', 'full', {'add', 'cat', 'mul'}),
    ('yolox', 'per_channel', {'add', 'cat', 'mul'}), ('rtmdet', 'full', {'add', 'cat', 'mul'})])
def test_every_tensor_between_layers_is_on_the_grid_of_its_quantizer(flowing, kind, dataflow, functions):
    detector, structure = copy.deepcopy(flowing(kind, dataflow))
    check = Check(detector, structure.sites)
    for layer in structure.layers:
        calls = iter(layer.inputs * 2)
        detector.get_submodule(layer.name).register_forward_pre_hook(
            lambda m, args, calls=calls: check.see('layer', next(calls), args[0]))
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
    name = next(site['activation'] for site in structure.sites if site['observes']) if kind == 'rtmdet' \
        else 'neck/lateral_convs/0/conv:out'
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
    gate = next(name for name, entry in structure.activations.items() if 'range' in entry)
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
        units = find_units(detector, lambda: predict_aligned(detector, images, data['data_samples'][:1]))
    streams = Streams(detector, units, ActivationStore(2**30, tmp_path))
    streams.add(data, is_two_stage(detector))
    seen = {}
    handles = [detector.get_submodule(unit.name).register_forward_hook(
        lambda m, args, out, name=unit.name: seen.setdefault(name, []).append(out.clone())) for unit in units]
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
    rates = dict.fromkeys(('scale', 'mu', 's', 'k', 'eps', 'weight', 'bias'), 1.0)
    train_only_quantization(detector, rates)
    data = detector.data_preprocessor(tiny_batch(2), False)
    for _ in range(2):
        detector.zero_grad()
        outputs = detector(**copy.deepcopy(data), mode='tensor')
        flat = [t for t in tree_leaves(outputs) if torch.is_tensor(t) and t.requires_grad]
        sum(t.square().sum() for t in flat).backward()
    for name, quantizer in detector.ptq.activations.items():
        if 'range' in structure.activations[name]:
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


@pytest.mark.parametrize('kind, dataflow', [
    ('retinanet', 'full'), ('ssd', 'full'), ('yolox', 'per_channel'), ('rtmdet', 'full'), ('faster_rcnn', 'full')])
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


@pytest.mark.parametrize('act, channels, gate', [
    (nn.SiLU(), 4, 'silu'), (nn.Hardswish(), 4, 'hardswish'), (lambda x: x * x.sigmoid(), 4, 'sigmoid'),
    (nn.Sigmoid(), None, None), (nn.LeakyReLU(), None, None), (lambda x: x.sigmoid() + x, None, None),
    (lambda x: F.silu(x) + x, None, None)])
def test_a_scale_per_channel_before_gated_activations(act, channels, gate):
    def between(self, a, b):
        self.seen = a, self.act(a)
        return self.seen[1] + b

    detector, structure, image = toy(between, dict(dataflow='per_channel'), act=act)
    entry = structure.activations['stem:out']
    assert entry['spec']['num_channels'] == channels and entry['spec']['shared_zero_point'] is (channels is not None)
    assert structure.activations['other:out']['spec']['num_channels'] is None
    with quantization_mode(detector, 'float'):
        expected = detector(image)
    error = expected.sub(detector(image)).norm()
    assert error < 0.05 * expected.norm()
    plain = toy(between, act=act)[0]
    assert torch.equal(plain(image), detector(image)) is (channels is None)
    module = 'act' if isinstance(act, nn.Module) else ''
    assert structure.islands == ([] if gate is None else [
        dict(module=module, operation=gate, reason='its input has a scale per channel')])
    if gate is not None:
        # computed in float between two quantizers
        assert not any('range' in entry for entry in structure.activations.values())
        site = next(site for site in structure.sites if site['activation'] and site['function'] != 'add')
        assert site['gate'] is None
        quantizer, (before, after) = detector.ptq.activations, detector.seen
        assert torch.equal(quantizer['stem:out'](before), before)
        assert torch.equal(quantizer[site['activation']](act(before)), after)


def test_a_float_gate_is_told_once_with_its_first_reason():
    class Twice(nn.Module):
        def forward(self, x):
            return F.silu(x)

    _, structure, _ = toy(lambda self, a, b: self.twice(a) + self.twice(b), dict(dataflow='per_channel'), twice=Twice())
    assert structure.islands == [
        dict(module='twice', operation='silu', reason='its input has a scale per channel')]
    _, structure, _ = toy(lambda self, a, b: F.silu(a).exp() + b, dict(dataflow='per_channel'))
    assert [(i['operation'], i['reason']) for i in structure.islands][:1] == [
        ('silu', 'only float operations read it')]
