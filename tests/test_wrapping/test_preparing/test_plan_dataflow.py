"""Quantized tensors between the layers: which ones they are."""

from collections import Counter

import architectures
import pytest
import torch
import torch.nn.functional as F
from dataflow_toys import OUT, READ, inputs_of, outputs_of, sites_in, toy
from torch import nn

from mmdet_ptq.testing import tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import quantization_mode
from mmdet_ptq.wrapping.watching.layers import is_pointwise


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


@pytest.mark.parametrize(
    'between, own',
    [
        (lambda self, a, b: a + b, {'stem:out', 'other:out'}),
        (lambda self, a, b: (a + b).relu(), {'stem:out', 'other:out'}),
        (lambda self, a, b: a.sigmoid() * b, {'stem:out', 'other:out', ':sigmoid'}),
        (lambda self, a, b: F.silu(a, inplace=True) - b, {'stem:out', 'other:out', ':silu', ':silu/sigmoid'}),
        (lambda self, a, b: F.hardswish(a) + F.relu(b), {'stem:out', ':relu', ':hardswish', ':hardswish/hardsigmoid'}),
        (
            lambda self, a, b: F.leaky_relu(a) + F.avg_pool2d(b, 3, 1, 1),
            {'stem:out', 'other:out', ':leaky_relu', ':avg_pool2d'},
        ),
        (
            lambda self, a, b: F.interpolate(a, scale_factor=2) + F.interpolate(b, scale_factor=2, mode='bilinear'),
            {'stem:out', 'other:out', ':interpolate-1'},
        ),
        # a sum of joined tensors: they share the scale of what they are joined into
        (lambda self, a, b: torch.cat([a, b], 1) + 1.0, {':cat'}),
        # two tensors of different scales are read by two operations: no sharing
        (lambda self, a, b: torch.cat([a, a + b], 1), {'stem:out', 'other:out'}),
    ],
)
def test_each_tensor_between_the_layers_has_one_quantizer(between, own):
    detector, structure, image = toy(between)
    assert set(structure.activations) - {'stem', READ, 'bbox_head/1', OUT} == own
    assert not structure.islands
    for name in own:
        fixed = name.endswith('sigmoid')
        assert (structure.activations[name].range == [0.0, 1.0]) is fixed
        scale = detector.ptq.activations[name].scale
        assert scale == torch.tensor(1 / 255) if fixed else scale not in (1, 1 / 255)
        assert scale.requires_grad is not fixed
    with quantization_mode(detector, 'float'):
        expected = detector(image)
    assert expected.sub(detector(image)).norm() < 0.05 * expected.norm()


def test_float_islands_are_named_and_the_layers_around_them_stay_in_integers(monkeypatch):
    lines = []
    monkeypatch.setattr('mmdet_ptq.wrapping.preparing.plan_dataflow.print_log', lambda text, *_: lines.append(text))
    _, structure, _ = toy(lambda self, a, b: self.act(a).tanh() + (b * 2).exp(), act=nn.Mish())
    assert [(i['module'], i['operation']) for i in structure.islands] == [
        ('act', 'mish'),
        ('', 'tanh'),
        ('', 'mul'),
        ('', 'exp'),
        ('', 'add'),
    ]
    assert [i['reason'] for i in structure.islands][1:3] == [
        'float operations stand before it',
        'only float operations read it',
    ]
    assert 'operation mish stays float, no 8-bit form of it is known: act' in lines
    assert 'operation tanh stays float, float operations stand before it: (the detector itself)' in lines
    assert outputs_of(structure)['stem'] == ['stem:out'] and outputs_of(structure)['other'] == ['other:out']
    assert not structure.sites


def test_a_scale_per_channel_stays_behind_what_moves_channels():
    def joined(dataflow):
        layer = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        return toy(lambda self, a, b: self.depthwise(torch.cat([a, b], 1)), dict(dataflow=dataflow), depthwise=layer)

    _, structure, _ = joined('speed')
    assert structure.activations['depthwise'].spec['num_channels'] is None
    _, structure, _ = joined('accuracy')
    assert structure.activations['depthwise'].spec['num_channels'] == 8
    assert outputs_of(structure)['stem'] == ['stem:out'] and outputs_of(structure)['other'] == ['other:out']
    # but through a pooling it goes
    _, structure, _ = toy(
        lambda self, a, b: self.depthwise(F.max_pool2d(a, 2)), depthwise=nn.Conv2d(4, 4, 3, padding=1, groups=4)
    )
    assert structure.activations['depthwise'].spec['num_channels'] == 4
    assert outputs_of(structure)['stem'] == ['depthwise']
    # what others read, too, has one scale
    _, structure, _ = toy(lambda self, a, b: self.depthwise(a) + a, depthwise=nn.Conv2d(4, 4, 3, padding=1, groups=4))
    assert structure.activations['depthwise'].spec['num_channels'] is None


@pytest.mark.parametrize(
    'between, alone',
    [
        (lambda self, a, b: self.depthwise(F.silu(a)), True),
        (lambda self, a, b: self.depthwise(x := F.silu(a)) + x, False),
        (lambda self, a, b: torch.cat([self.depthwise(x := F.silu(a)), F.max_pool2d(x, 3, 1, 1)], 1), False),
        (lambda self, a, b: self.depthwise(x := F.silu(a)) + x.erf(), False),
        (lambda self, a, b: self.depthwise(F.max_pool2d(x := F.silu(a), 3, 1, 1)) + x.erf(), False),
        (lambda self, a, b: self.depthwise(x := F.silu(a)) + self.floating(x), False),
    ],
)
def test_others_do_not_read_the_few_bits_of_a_layer(between, alone):
    few = dict(activations=OBSERVE['activations'] | dict(bits=4))
    detector, structure, image = toy(
        between,
        {**few, 'overrides': {'floating': dict(weights=dict(float=True), activations=dict(float=True))}},
        depthwise=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        floating=nn.Conv2d(4, 4, 1),
    )
    spec = structure.activations['depthwise'].spec
    assert (spec['bits'], spec['num_channels']) == (4, 4)
    name = sites_in(structure, '')['silu', 0]
    assert (name == 'depthwise') == alone
    if not alone:
        own = structure.activations[name].spec
        assert (own['bits'], own['num_channels']) == (8, None)
        seen = {}
        for key in (name, 'depthwise'):
            detector.ptq.activations[key].register_forward_hook(
                lambda _, args, output, key=key: seen.update({key: (args[0], output)})
            )
        detector(image)
        # 8 bits first, then its own 4, as it is exported
        pooled = F.max_pool2d(seen[name][1], 3, 1, 1)
        assert any(torch.equal(seen['depthwise'][0], x) for x in (seen[name][1], pooled))


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize(
    'same, plain',
    [
        (lambda self, a, b: a.contiguous() + b.to(a), lambda self, a, b: a + b),
        (lambda self, a, b: F.relu(a.contiguous() + b).contiguous(), lambda self, a, b: F.relu(a + b)),
        (lambda self, a, b: F.dropout(F.silu(a), 0.5, False) + b, lambda self, a, b: F.silu(a) + b),
    ],
)
def test_what_hands_on_its_input_as_it_is_counts_for_nothing(same, plain, bits):
    few = dict(activations=OBSERVE['activations'] | dict(bits=bits))
    (detector, structure, image), (expected, structure_expected, _) = toy(same, few), toy(plain, few)
    assert structure.to_dict() == structure_expected.to_dict()
    assert torch.equal(detector(image), expected(image))


def test_regions_of_few_bits_have_a_dataflow():
    few = dict(activations=OBSERVE['activations'] | dict(bits=4))
    _, structure = tiny_quantized('faster_rcnn', {**OBSERVE, **few, 'dataflow': 'full'})
    assert structure.sites and {e.spec['bits'] for e in structure.activations.values()} == {4, 8}


@pytest.mark.parametrize(
    'activations, bits, symmetric',
    [
        (dict(bits=4), 8, False),
        (dict(bits=16), 16, False),
        (dict(quantizer=dict(type='mmdet_ptq.AffineQuantizer', symmetric=True)), 8, True),
    ],
)
def test_formats(activations, bits, symmetric):
    _, structure, _ = toy(lambda self, a, b: F.silu(a) + b, dict(activations=OBSERVE['activations'] | activations))
    specs = {name: entry.spec for name, entry in structure.activations.items()}
    for name in ('stem:out', ':silu', ':silu/sigmoid'):
        assert (specs[name]['bits'], specs[name]['symmetric'], specs[name]['num_channels']) == (bits, symmetric, None)
    assert specs[READ]['bits'] == activations.get('bits', 8)


def test_what_is_changed_in_place_and_read_under_its_old_name_is_an_island():
    def between(self, a, b):
        a.add_(b)
        return a + b

    detector, structure, image = toy(between)
    assert structure.islands[0] == dict(
        module='', operation='add_', reason='it changes a tensor in place that is read under its old name'
    )
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
        'stem': [],
        'other': ['other:out'],
        'bbox_head.0': ['bbox_head/1'],
        'bbox_head.1': [OUT],
    }
    _, structure, _ = toy(lambda self, a, b: a + b, dict(head='float'))
    assert not any(outputs_of(structure).values()) and not structure.sites
    _, structure, _ = toy(lambda self, a, b: a + b, dict(head='float_outputs'))
    assert outputs_of(structure)['bbox_head.0'] == outputs_of(structure)['bbox_head.1'] == []


@pytest.mark.parametrize('dataflow', ['full', 'per_channel'])
@pytest.mark.parametrize('symmetric', [False, True])
def test_what_the_heads_put_out_has_a_scale_per_channel(dataflow, symmetric):
    quantizer = dict(type='mmdet_ptq.AffineQuantizer', symmetric=symmetric)
    detector, structure, image = toy(
        lambda self, a, b: a + b,
        dict(dataflow=dataflow, activations=OBSERVE['activations'] | dict(bits=4, quantizer=quantizer)),
    )
    spec = structure.activations[OUT].spec
    assert (spec['bits'], spec['num_channels'], spec['channel_axis']) == (8, 2, 1)
    assert spec['shared_zero_point'] is not symmetric and spec['symmetric'] is symmetric
    quantizer, seen = detector.ptq.activations[OUT], []
    assert quantizer.scale[0] != quantizer.scale[1] and quantizer.zero_point.unique().numel() == 1
    quantizer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    out = detector(image)
    assert len(seen) == 1 and not torch.equal(seen[0], out)
    assert torch.equal(quantizer.decode(quantizer.encode(seen[0])), out)


@pytest.mark.parametrize(
    'act, operation',
    [
        (nn.Mish(inplace=True), 'mish'),
        (nn.ReLU6(inplace=True), 'hardtanh'),
        (nn.SiLU(inplace=True), 'silu'),
        (torch.sigmoid_, 'sigmoid_'),
        (lambda x: x.mul_(2).relu_(), 'relu_'),
    ],
)
def test_operations_in_place_leave_what_gradients_need(act, operation):
    def between(self, a, b):
        a = self.act(a + b)
        a += b
        return F.relu(a, inplace=True)

    detector, structure, image = toy(between, act=act)
    assert operation in {site['function'] for site in structure.sites}
    detector(image).square().sum().backward()
    for name, quantizer in detector.ptq.activations.items():
        assert structure.activations[name].range or quantizer.scale.grad.any(), name
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
        (0, inputs[f'{block}.conv2'][0]),
        (1, inputs['backbone.layer2.1.conv1'][0]),
    ]
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
        ('hardtanh', 0): inputs[f'{block}.depthwise_conv.conv'][0]
    }
    assert structure.activations[inputs[f'{block}.depthwise_conv.conv'][0]].spec['num_channels'] is not None
    assert outputs[f'{block}.linear_conv.conv'] == ['backbone/layer3/1/linear_conv/conv:out']
    assert sites_in(structure, block) == {('add', 0): inputs['backbone.layer3.2.expand_conv.conv'][0]}
    # what the next layer reads and what is added to is one tensor
    assert outputs['backbone.layer2.0.linear_conv.conv'] == inputs['backbone.layer2.1.expand_conv.conv']
    assert not structure.islands


def test_partial_stage_with_silu_and_concatenation(flowing):
    _, structure = flowing('yolox')
    inputs, outputs = inputs_of(structure), outputs_of(structure)
    stage = 'backbone.stage1.1'
    joined = inputs[f'{stage}.final_conv.conv'][0]
    assert sites_in(structure, stage) == {('cat', 0): joined}
    assert sites_in(structure, f'{stage}.short_conv.activate')['mul', 0] == joined
    assert sites_in(structure, f'{stage}.blocks.0') == {('add', 0): joined}
    assert outputs[f'{stage}.short_conv.conv'] == ['backbone/stage1/1/short_conv/conv:out']
    gate = sites_in(structure, f'{stage}.short_conv.activate')['sigmoid', 0]
    assert structure.activations[gate].range == [0.0, 1.0]
    # spatial pyramid pooling moves values
    pool = 'backbone.stage2.1'
    assert sites_in(structure, f'{pool}.conv1.activate')['mul', 0] == inputs[f'{pool}.conv2.conv'][0]
    # the image is nobody's output, and Swish is a product of quantized factors
    assert not sites_in(structure, 'backbone.stem') and not structure.islands


def test_per_channel_dataflow_leaves_swish_in_float(flowing):
    detector, structure = flowing('yolox', 'per_channel')
    full = flowing('yolox')[1]
    gates = {(site['module'], site['function']) for site in full.sites if site['function'] == 'sigmoid'}
    islands = {(i['module'], i['operation']): i['reason'] for i in structure.islands}
    inputs = ('its input has a scale per channel', 'a matrix product hands it floats')
    assert {place for place, reason in islands.items() if reason in inputs} == gates
    assert len(gates) > 20
    # a depthwise convolution and another layer read what these compute
    own = {(f'{part}.final_conv.activate', 'mul') for part in ('backbone.stage1.1', 'neck.top_down_blocks.0')}
    assert {p for p, reason in islands.items() if reason == 'its readers have quantizers of their own'} == own
    assert len(islands) == len(gates) + len(own)
    assert not any(entry.range for entry in structure.activations.values())
    # all else is as in the full dataflow
    assert [site for site in structure.sites if site['activation']] == [
        site
        for site in full.sites
        if site['activation'] and site['function'] != 'sigmoid' and (site['module'], site['function']) not in own
    ]
    # pointwise convolutions are matrix products, which hand on floats
    written = {
        name: [] if is_pointwise(detector.get_submodule(name)) else outputs
        for name, outputs in outputs_of(full).items()
    }
    assert outputs_of(structure) == written != outputs_of(full)
    assert set(islands.values()) >= set(inputs)
    for layer in structure.layers:
        for name in layer.outputs:
            module, quantizer = detector.get_submodule(layer.name), detector.ptq.activations[name]
            assert quantizer.num_channels == module.out_channels and quantizer.zero_point.unique().numel() == 1
    # one scale per tensor in the full dataflow; what the heads put out are products of matrices, in float
    assert {
        name for layer in full.layers for name in layer.outputs if full.activations[name].spec['num_channels']
    } == set()
    assert not any(layer.outputs for layer in full.layers if layer.name.startswith('bbox_head.multi_level_conv_'))


@pytest.mark.thorough
def test_what_stays_float_in_tiny_detectors(flowing):
    # one normalisation per level after a shared convolution
    assert {i['operation'] for i in flowing('rtmdet')[1].islands} == {'batch_norm', 'silu'}
    islands = flowing('faster_rcnn')[1].islands
    assert 'RoIAlignFunction' in {i['operation'] for i in islands}
    assert {i['module'] for i in islands} == {'roi_head.bbox_roi_extractor'}


# ------------------------------------------------------------------ the forward pass


def test_what_a_layer_writes_has_one_zero_point_where_a_depthwise_convolution_reads_it(monkeypatch):
    """ONNX Runtime's convolutions write no other: the first run failed."""
    architectures.register(monkeypatch)
    _, structure = tiny_quantized('pvt', dict(OBSERVE, dataflow='accuracy'))
    written = {name for layer in structure.layers for name in layer.outputs if name}
    uneven = [name for name in written if structure.activations[name].spec.get('num_channels') is not None]
    assert any('/ffn/' in name for name in uneven)
    assert all(structure.activations[name].spec['shared_zero_point'] for name in uneven)
