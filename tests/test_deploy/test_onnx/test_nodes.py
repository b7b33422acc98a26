"""Quantizers as nodes, and those as QuantizeLinear and DequantizeLinear that mean what is simulated."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
ir = pytest.importorskip('onnx_ir', reason="needs pip install 'mmdet-ptq[onnxruntime]'")

from onnx import TensorProto, helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from mmdet_ptq.deploy.onnx.nodes import DOMAIN, OPSET, check_activation_formats, expand_quantizers, quantizer_nodes  # noqa: E402
from mmdet_ptq.errors import PTQError  # noqa: E402
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer  # noqa: E402
from mmdet_ptq.wrapping import Structure  # noqa: E402
from mmdet_ptq.wrapping.state import QuantizationState  # noqa: E402
from mmdet_ptq.wrapping.structure import ActivationStructure  # noqa: E402
from mmdet_ptq.wrapping.weights import attach_weight  # noqa: E402

SHAPE = (2, 3, 4, 5)


def activation(bits=8, channels=None, axis=1, **more):
    quantizer = AffineQuantizer(bits, num_channels=channels, channel_axis=axis, **more)
    ends = torch.linspace(1, 2, channels) if channels else torch.tensor(1.5)
    quantizer.set_range(-ends, 2 * ends)
    return quantizer


ACTIVATIONS = {
    'plain': activation(),
    'symmetric': activation(symmetric=True),
    'narrow': activation(symmetric=True, narrow_range=True),
    'seven': activation(7),
    'four': activation(4, symmetric=True),
    'wide': activation(16),
    'wide/signed': activation(16, symmetric=True),
    'channels': activation(channels=3),
    'channels/four': activation(4, channels=3, symmetric=True),
    'last': activation(6, channels=5, axis=-1),
}


def detector_of(quantizers=ACTIVATIONS, **layers):
    detector = nn.Module()
    detector.ptq = QuantizationState(dict(quantizers), dict.fromkeys(quantizers, 1))
    for name, layer in layers.items():
        setattr(detector, name, layer)
    return detector


def graph_of(*nodes):
    """A model of nodes as quantizers write them: kind, name, what is read and what is written; all are outputs."""
    made, inputs = [], {}
    for kind, name, source, target, shape in nodes:
        node = helper.make_node(kind, [source], [target], domain=DOMAIN)
        node.attribute.append(helper.make_attribute('name', name))
        made.append(node)
        inputs |= {source: shape} if source in ('x', 'w') else {}
    shapes = {target: shape for *_, target, shape in nodes}
    graph = helper.make_graph(
        made,
        'graph',
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
    )
    imports = [helper.make_opsetid('', OPSET), helper.make_opsetid(DOMAIN, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))


def expanded(detector, *nodes, clip_codes=False, unsigned=False, rounds_wide=True):
    model = graph_of(*nodes)
    expand_quantizers(model.graph, detector, clip_codes, unsigned, rounds_wide)
    assert {node.domain for node in model.graph} <= {''} and DOMAIN not in model.graph.opset_imports
    return model


def computed(model, **given):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return ReferenceEvaluator(proto).run(None, given)


def kinds(model):
    return [node.op_type for node in model.graph]


X = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize('clip_codes, unsigned', list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize('name', ACTIVATIONS)
def test_activations_mean_what_is_simulated(name, clip_codes, unsigned):
    quantizer, node = ACTIVATIONS[name], ('Activation', name, 'x', 'y', SHAPE)
    model = expanded(detector_of(), node, clip_codes=clip_codes, unsigned=unsigned)
    expected = quantizer(X).detach().numpy()
    (found,) = computed(model, x=X.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # codes have as many values as there are levels, and their type says whether they have a sign
    codes = next(node.outputs[0] for node in model.graph if node.op_type == 'QuantizeLinear')
    wide, signed = quantizer.bits > 8, quantizer.symmetric and not (unsigned and quantizer.bits <= 8)
    assert codes.dtype == getattr(ir.DataType, f'{"" if signed else "U"}INT{16 if wide else 8}')
    assert codes.name == f'{name}:codes'
    whole = quantizer.code_range in ((0, 255), (-128, 127), (0, 65535), (-(2**15), 2**15 - 1))
    bounded = [] if whole else ['Clip'] if clip_codes and not wide else ['Max', 'Min']
    assert sorted(set(kinds(model)) - {'QuantizeLinear', 'DequantizeLinear'}) == bounded


@pytest.mark.parametrize('name', ['wide', 'wide/signed'])
def test_what_is_wide_may_stay_unrounded(name):
    quantizer = ACTIVATIONS[name]
    model = expanded(detector_of(), ('Activation', name, 'x', 'y', SHAPE), clip_codes=True, rounds_wide=False)
    assert kinds(model) == ['Max', 'Min']
    low, high = ((code - int(quantizer.zero_point)) * float(quantizer.scale.detach()) for code in quantizer.code_range)
    (found,) = computed(model, x=X.numpy())
    np.testing.assert_allclose(found, X.numpy().clip(low, high), rtol=1e-6)
    assert 0 < (found != X.numpy()).mean() < 1
    # eight bits are none of them
    narrow = expanded(detector_of(), ('Activation', 'plain', 'x', 'y', SHAPE), rounds_wide=False)
    assert kinds(narrow) == ['QuantizeLinear', 'DequantizeLinear']


def test_each_run_of_a_quantizer_has_a_name_and_all_share_its_constants():
    runs = [('Activation', 'seven', 'x', 'y', SHAPE), ('Activation', 'seven', 'y', 'z', SHAPE)]
    model = expanded(detector_of(), *runs, ('Activation', 'plain', 'x', 'other', SHAPE), clip_codes=True)
    names = [node.name for node in model.graph]
    assert names[:6] == [f'seven{run}:{what}' for run in ('', '@1') for what in ('codes', 'clipped', 'value')]
    assert names[6:] == ['plain:codes', 'plain:value']
    pair = {'scale', 'zero_point'}
    assert set(model.graph.initializers) == {
        *(f'{name}:{what}' for name in ('seven', 'plain') for what in pair),
        'seven:lowest',
        'seven:highest',
    }
    first, again, plain = computed(model, x=X.numpy())
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(plain, ACTIVATIONS['plain'](X).detach(), rtol=1e-6)


def weighted(layer, quantizer):
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    attach_weight(layer, quantizer)
    quantized = layer.parametrizations.weight[0]
    quantized.quantizer.fit_weight(quantized.layout.to_rows(layer.parametrizations.weight.original.detach()))
    return layer


def signed(bits, rows):
    return AffineQuantizer(bits, symmetric=True, num_channels=rows, channel_axis=0)


WEIGHTS = {
    'conv': (nn.Conv2d(4, 6, 3), signed(8, 6), True),
    'tensor': (nn.Conv2d(4, 6, 1), AffineQuantizer(8, symmetric=True, channel_axis=0), True),
    'asymmetric': (nn.Linear(5, 6), AffineQuantizer(4, num_channels=6, channel_axis=0), True),
    'logarithms': (nn.Conv2d(4, 6, 3), LogAffineQuantizer(4, 6), True),
    'up': (nn.ConvTranspose2d(4, 6, 2), signed(8, 6), True),
    'grouped': (nn.ConvTranspose2d(4, 6, 2, groups=2), signed(8, 6), False),
    'wide': (nn.Linear(5, 6), signed(16, 6), False),
}


@pytest.mark.parametrize('kind', WEIGHTS)
def test_weights_are_integers_where_an_int8_holds_them(kind):
    module, quantizer, integer = WEIGHTS[kind]
    layer = weighted(module, quantizer)
    shape = tuple(layer.weight.shape)
    model = expanded(detector_of({}, layer=layer), ('Weight', 'layer', 'w', 'y', shape), unsigned=True)
    # what the node reads in the exported graph counts for nothing
    if integer:
        (found,) = computed(model, w=np.zeros(shape, np.float32))
        assert kinds(model) == ['DequantizeLinear']
        assert model.graph.initializers['layer.weight'].dtype == ir.DataType.INT8
        assert model.graph.initializers['layer.weight'].shape == ir.Shape(shape)
        assert model.graph.initializers['layer.weight_scale'].shape == ir.Shape([6])
    else:
        assert not len(model.graph)
        (output,) = model.graph.outputs
        assert output.name == 'layer.weight_float'
        found = output.const_value.numpy()
    torch.testing.assert_close(torch.from_numpy(found), layer.weight.detach(), rtol=1e-6, atol=1e-7)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = weighted(nn.Conv2d(3, 6, 1), signed(8, 6))
        quantizers = {'conv': activation()}
        self.ptq = QuantizationState(quantizers, {'conv': 2})

    def forward(self, x):
        x = self.ptq.activations['conv'](x)
        return self.conv(x) + self.ptq.activations['conv'](x[:, :1] + 1)


@pytest.mark.thorough
def test_quantizers_write_nodes_while_they_are_exported():
    detector = Small().eval().requires_grad_(False)
    before = detector(X)
    with quantizer_nodes(detector):
        program = torch.onnx.export(detector, (X,), dynamo=True, opset_version=OPSET, verbose=False)
    graph = program.model.graph
    found = [(node.op_type, node.attributes['name'].as_string()) for node in graph if node.domain == DOMAIN]
    assert sorted(found) == [('Activation', 'conv'), ('Activation', 'conv'), ('Weight', 'conv')]
    # afterwards they quantize again
    assert detector(X).equal(before)
    expand_quantizers(graph, detector, clip_codes=False, unsigned=False, rounds_wide=True)
    name = graph.inputs[0].name
    (found,) = computed(program.model, **{name: X.numpy()})
    np.testing.assert_allclose(found, before, rtol=1e-5, atol=1e-5)


def test_quantizers_are_left_as_they_were_when_an_export_fails():
    detector = Small().eval()
    with pytest.raises(ZeroDivisionError), quantizer_nodes(detector):
        assert not isinstance(detector.ptq.activations['conv'].forward, type(detector.forward))
        raise ZeroDivisionError
    for module in detector.modules():
        assert 'forward' not in vars(module)


def test_formats_of_ones_own_are_refused_by_their_name():
    structure = Structure(activations={'neck': ActivationStructure(activation(4).spec(), 1)})
    check_activation_formats(structure)
    structure.activations['head:add'] = ActivationStructure(LogAffineQuantizer(4).spec(), 1)
    told = r"the activation head:add has the format mmdet_ptq\.LogAffineQuantizer.*type='mmdet_ptq\.AffineQuantizer'"
    with pytest.raises(PTQError, match=told):
        check_activation_formats(structure)
