import json
import sys
from types import SimpleNamespace

import architectures
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from mmdet_ptq.deploy import export_onnx, open_model, quantized_state, save_quantized, settle_biases
from mmdet_ptq.deploy.network.parts import part_path, parts_of
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.deploy.tensorrt.rules import check_tensorrt_formats, check_tensorrt_model, check_tensorrt_rules
from mmdet_ptq.deploy.tensorrt.runtime import TRTEXEC, TensorRT, integer_coverage
from mmdet_ptq.engine.api import load_quantized
from mmdet_ptq.engine.export_again import export_checkpoint
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_detector, tiny_model_cfg, tiny_quantized
from mmdet_ptq.wrapping import LayerStructure, Structure, freeze_weights, quantized_weights
from mmdet_ptq.wrapping.structure import ActivationStructure

onnxruntime = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
SYMMETRIC = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'), quantizer=dict(symmetric=True))
W8A8 = dict(preset='w8a8_observe', activations=SYMMETRIC)
# residual additions in integers, codes of 6 bits, weights looked up in a table elsewhere
W4A6 = dict(
    W8A8,
    dataflow='full',
    activations=dict(SYMMETRIC, bits=6),
    weights=dict(bits=4, quantizer=dict(type='mmdet_ptq.LogAffineQuantizer', location='median')),
)
CASES = [
    pytest.param('retinanet', W4A6, id='retinanet-w4a6-dataflow'),
    pytest.param('yolox', dict(W8A8, dataflow='full'), id='yolox-w8a8-dataflow', marks=pytest.mark.slow),
]
SHAPE = (1, 3, 64, 64)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A quantized.pth of an SSDLite: ReLU6, and a scale per channel before its depthwise convolutions."""
    detector, structure = tiny_quantized('ssd', W8A8)
    settle_biases(detector, structure)
    path = tmp_path_factory.mktemp('ssd') / 'quantized.pth'
    save_quantized(path, quantized_state(detector, structure, dict(model=tiny_model_cfg('ssd')), None, SHAPE))
    return path


@pytest.fixture(scope='module')
def written(checkpoint):
    """The ONNX file that tools/export.py writes where TensorRT is missing, and what it says."""
    said = []
    (checkpoint.parent / 'tensorrt').mkdir()
    (checkpoint.parent / 'tensorrt' / 'model.engine').write_bytes(b'of an earlier export')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'tensorrt', None)
        patch.setattr('mmdet_ptq.deploy.tensorrt.runtime.print_log', lambda text, *args: said.append(text))
        (path,) = export_checkpoint(checkpoint, ['tensorrt'])
    return path, said


@pytest.fixture
def model(written):
    return onnx.load(written[0])


def image(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(detector, model, x):
    """The largest difference of an output, against its standard deviation."""
    pairs = list(zip(RawOutputs(detector)(x), model(x.numpy()), strict=True))
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)
    return max(float(np.abs(ours.numpy() - theirs).max() / ours.std()) for ours, theirs in pairs)


def compare(detector, path):
    """The exported graph as it stands, without ONNX Runtime's own fusions, against the simulation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    # a code that rounds the other way grows in random weights: one image of three has none
    assert min(difference(detector, lambda x: session.run(None, {'input': x}), image(seed)) for seed in range(3)) < 1e-5


@pytest.mark.thorough
def test_without_tensorrt_the_file_is_written_for_another_machine(written, checkpoint):
    path, (said,) = written
    assert path == checkpoint.parent / 'tensorrt' / 'model.onnx'
    # an engine of an earlier export would look as if it were built from this file
    assert [file.name for file in path.parent.iterdir()] == ['model.onnx']
    assert TRTEXEC in said and "pip install 'mmdet-ptq[tensorrt]'" in said


def test_scales_per_channel_leave_the_activations(written, checkpoint):
    detector = load_quantized(checkpoint)
    assert any(q.num_channels for q in detector.ptq.activations.values())
    check_tensorrt_rules(written[0])
    compare(detector, written[0])


@pytest.mark.parametrize('kind,ptq', CASES)
def test_exported_graphs_obey_and_compute_what_is_simulated(kind, ptq, tmp_path):
    detector, structure = tiny_quantized(kind, ptq)
    check_tensorrt_formats(structure)
    settle_biases(detector, structure)
    freeze_weights(detector)
    export_onnx(detector, tmp_path / 'model.onnx', SHAPE, runtime='tensorrt')
    check_tensorrt_rules(tmp_path / 'model.onnx')
    graph = onnx.load(tmp_path / 'model.onnx').graph
    constants = {entry.name: entry.data_type for entry in graph.initializer}
    assert all(constants[f'{name}.weight'] == onnx.TensorProto.INT8 for name in quantized_weights(detector))
    assert 'Clip' not in {node.op_type for node in graph.node if 'codes' in node.input[0]}
    compare(detector, tmp_path / 'model.onnx')


@pytest.mark.thorough
@pytest.mark.parametrize('kind', ['pvt', 'deformable_detr'])
def test_transformers_obey_and_compute_what_is_simulated(kind, tmp_path, monkeypatch):
    architectures.register(monkeypatch)
    detector, structure = tiny_quantized(kind, dict(W8A8, export=['tensorrt']))
    assert structure.products
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = tmp_path / 'model.onnx'
    export_onnx(detector, path, SHAPE, runtime='tensorrt')
    check_tensorrt_rules(path)
    graph = onnx.load(path).graph
    made = {out: node for node in graph.node for out in node.output}
    (products,) = [json.loads(entry.value)['products'] for entry in graph_meta(path)]
    for node in graph.node:
        if node.name in products:  # codes with a sign, which TensorRT multiplies in integers
            assert [is_code_of(made, value) for value in node.input] == [True, True]
    compare(detector, path)


def graph_meta(path):
    return [entry for entry in onnx.load(path).metadata_props if entry.key == 'mmdet_ptq']


def is_code_of(made, value):
    """Whether a value is dequantized, be it moved behind that."""
    while made[value].op_type in ('Transpose', 'Reshape', 'Expand', 'Unsqueeze'):
        value = made[value].input[0]
    return made[value].op_type == 'DequantizeLinear'


@pytest.mark.thorough
@pytest.mark.parametrize('kind', ['faster_rcnn', pytest.param('mask_rcnn', marks=pytest.mark.thorough)])
def test_each_network_of_two_stages_obeys_and_computes_what_is_simulated(kind, tmp_path, monkeypatch):
    architectures.register(monkeypatch)
    detector, structure = tiny_quantized(kind, dict(W8A8, dataflow='full'))
    settle_biases(detector, structure)
    freeze_weights(detector)
    said = []
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    monkeypatch.setattr('mmdet_ptq.deploy.tensorrt.runtime.print_log', lambda text, *args: said.append(text))
    path = TensorRT.export(detector, tmp_path, SHAPE)
    parts = parts_of(detector, image())
    assert TRTEXEC in said[0] and len(said) == len(parts)
    assert 'trtexec --onnx=model-roi_head.bbox_head.onnx --saveEngine=model-roi_head.bbox_head.engine' in said[1]
    assert '--minShapes=input:1x16x5x5' in said[1] and '--maxShapes=input:1000x16x5x5' in said[1]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for part in parts:
        file = part_path(path, part.name) if part.name else path
        check_tensorrt_rules(file)
        session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
        given = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), part.inputs, strict=True)}
        with torch.no_grad():
            expected = RawOutputs(detector, part)(*part.inputs)
        for ours, theirs in zip(expected, session.run(None, given), strict=True):
            assert np.abs(ours.numpy() - theirs).mean() <= 1e-2 * float(ours.std())
    # all of them go with the one that names them
    TensorRT.export(tiny_detector('retinanet'), tmp_path, SHAPE)
    assert [file.name for file in tmp_path.iterdir()] == ['model.onnx']


def node_of(model, op_type, constant_input=False):
    constants = {entry.name for entry in model.graph.initializer}
    return next(
        node for node in model.graph.node if node.op_type == op_type and (node.input[0] in constants) == constant_input
    )


def give(model, node, place, array, dtype=None):
    """Gives a node a constant of its own."""
    name = f'{node.name}_changed_{place}'
    model.graph.initializer.append(
        numpy_helper.from_array(array, name)
        if dtype is None
        else helper.make_tensor(name, dtype, array.shape, array.flatten().tolist())
    )
    del node.input[place : place + 1]
    node.input.insert(place, name)


def a_zero_point(model):
    node = node_of(model, 'QuantizeLinear')
    give(model, node, 2, np.array(1, np.int8))
    return node


def uint8_codes(model):
    node = node_of(model, 'DequantizeLinear')
    give(model, node, 2, np.array(0, np.uint8))
    return node


def no_zero_point(model):
    node = node_of(model, 'QuantizeLinear')
    del node.input[2]
    return node


def scales_per_channel(model):
    node = node_of(model, 'QuantizeLinear')
    give(model, node, 1, np.ones(3, np.float32))
    give(model, node, 2, np.zeros(3, np.int8))
    return node


def a_negative_scale(model):
    node = node_of(model, 'DequantizeLinear')
    give(model, node, 1, np.array(-1, np.float32))
    return node


def a_quantized_bias(model):
    conv = node_of(model, 'Conv')
    bias = helper.make_node('DequantizeLinear', ['bias', 'bias_scale'], ['bias_value'], 'bias', axis=0)
    channels = next(entry.dims[0] for entry in model.graph.initializer if entry.name == conv.input[2])
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.ones(channels, np.int32), 'bias'),
            numpy_helper.from_array(np.ones(channels, np.float32), 'bias_scale'),
        ]
    )
    conv.input[2] = 'bias_value'
    model.graph.node.insert(0, bias)
    return bias


def scales_per_input_channel(model):
    node = node_of(model, 'DequantizeLinear', constant_input=True)
    shape = next(entry.dims for entry in model.graph.initializer if entry.name == node.input[0])
    next(attribute for attribute in node.attribute if attribute.name == 'axis').i = 1
    give(model, node, 1, np.ones(shape[1], np.float32))
    return node


def four_bit_weights(model):
    node = node_of(model, 'DequantizeLinear', constant_input=True)
    shape = next(entry.dims for entry in model.graph.initializer if entry.name == node.input[0])
    give(model, node, 0, np.zeros(shape, np.int64), onnx.TensorProto.UINT4)
    return node


def a_looked_up_table(model):
    model.graph.node.insert(0, helper.make_node('Cast', [], ['index'], 'index', to=onnx.TensorProto.INT32))
    give(model, model.graph.node[0], 0, np.zeros(4, np.uint8))
    return model.graph.node[0]


def clipped_codes(model):
    quantize = node_of(model, 'QuantizeLinear')
    place = list(model.graph.node).index(quantize) + 1
    model.graph.node.insert(place, helper.make_node('Clip', [quantize.output[0]], ['clipped'], 'clip'))
    return model.graph.node[place]


def codes_of_nobody(model):
    node = node_of(model, 'DequantizeLinear')
    node.input[0] = 'input'
    return node


def an_unknown_operator(model):
    model.graph.node.insert(0, helper.make_node('QLinearConv', ['input'], ['x'], 'integer'))
    return model.graph.node[0]


def a_foreign_domain(model):
    model.graph.node.insert(0, helper.make_node('Relu', ['input'], ['x'], 'foreign', domain='com.example'))
    return model.graph.node[0]


@pytest.mark.parametrize(
    'change,told',
    [
        (a_zero_point, 'zero points are 0'),
        (uint8_codes, 'these are UINT8'),
        (no_zero_point, 'uint8'),
        (scales_per_channel, 'one scale per tensor'),
        (a_negative_scale, 'scales are positive'),
        (a_quantized_bias, 'biases stay float'),
        (scales_per_input_channel, 'per output channel, this one along axis 1'),
        (four_bit_weights, 'this one is UINT4'),
        (a_looked_up_table, 'of type UINT8'),
        (clipped_codes, 'only DequantizeLinear'),
        (codes_of_nobody, 'no QuantizeLinear wrote'),
        (an_unknown_operator, 'does not know this operation'),
        (a_foreign_domain, 'does not know this operation'),
    ],
)
def test_a_broken_rule_names_its_node(model, change, told):
    check_tensorrt_model(model)
    node = change(model)
    with pytest.raises(PTQError) as raised:
        check_tensorrt_model(model)
    assert repr(node.name) in str(raised.value) and told in str(raised.value)


def test_nothing_is_kept_of_a_graph_that_breaks_a_rule(checkpoint, tmp_path, monkeypatch):
    def refuse(model):
        raise PTQError(f'{len(model.graph.node) > 0}')

    monkeypatch.setattr('mmdet_ptq.deploy.tensorrt.runtime.check_tensorrt_model', refuse)
    monkeypatch.setattr('mmdet_ptq.deploy.onnx.export.exported_program', lambda *args: tiny_graph())
    with pytest.raises(PTQError, match='True'):
        export_onnx(tiny_detector('retinanet'), tmp_path / 'model.onnx', SHAPE, runtime='tensorrt')
    assert list(tmp_path.iterdir()) == []


def tiny_graph():
    import onnx_ir as ir

    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ('input', 'output')]
    graph = helper.make_graph([helper.make_node('Relu', ['input'], ['output'], 'relu')], 'g', values[:1], values[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)])
    made.ir_version = 10
    return ir.from_proto(made)


def activation(**spec):
    return ActivationStructure(dict(type='mmdet_ptq.AffineQuantizer', bits=8, symmetric=True) | spec, readers=1)


def layer(weight):
    return LayerStructure(name='backbone.conv', kind='conv', part='backbone', macs=1, numel=1, weight=weight)


def weight(**spec):
    return layer(dict(type='mmdet_ptq.AffineQuantizer', bits=8) | spec)


@pytest.mark.parametrize(
    'structure,told',
    [
        (Structure(activations={'neck.x': activation(symmetric=False)}), '`ptq.activations.quantizer.symmetric=True`'),
        (Structure(activations={'neck.x': activation(bits=16)}), 'neck.x has 16 bits'),
        (Structure(activations={'neck.x': activation(type='mmdet_ptq.LogAffineQuantizer')}), 'neck.x has the format'),
        (Structure(layers=[weight(symmetric=False)]), '`ptq.weights.quantizer.symmetric=True`'),
    ],
)
def test_formats_are_refused(structure, told):
    with pytest.raises(PTQError, match=told):
        TensorRT.check_formats(structure)


def test_formats_that_fit():
    TensorRT.check_formats(
        Structure(
            activations={'x': activation(), 'y': activation(bits=4)},
            layers=[
                weight(symmetric=True),
                weight(symmetric=False, bits=4),
                layer(None),
                layer(dict(type='mmdet_ptq.LogAffineQuantizer', bits=4)),
            ],
        )
    )


def test_formats_are_refused_before_the_detector_is_built(tmp_path, monkeypatch):
    structure = Structure(activations={'neck.x': activation(symmetric=False)})
    monkeypatch.setattr(
        'mmdet_ptq.engine.export_again.read_quantized', lambda path: dict(structure=structure.to_dict())
    )
    monkeypatch.setattr('mmdet_ptq.engine.export_again.load_quantized', lambda path: pytest.fail('long work began'))
    with pytest.raises(PTQError, match='neck.x is quantized with a zero point'):
        export_checkpoint(tmp_path / 'quantized.pth', ['tensorrt'])


@pytest.mark.parametrize(
    'version,told',
    [
        (None, r"package tensorrt is not installed; pip install 'mmdet-ptq\[tensorrt\]'"),
        ('10.5.0', 'tensorrt 10.5.0 is too old'),
        ('10.16.1.11', 'NVIDIA GPU, and PyTorch sees none'),
    ],
)
def test_what_is_missing_is_named(monkeypatch, version, told):
    monkeypatch.setitem(sys.modules, 'tensorrt', version and SimpleNamespace(__version__=version))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(PTQError, match=told):
        TensorRT.check()


def described(name, datatype, kind='CaskConvolution', **more):
    return dict(Name=name, LayerType=kind, Inputs=[{'Name': 'x', 'Format/Datatype': datatype}], **more)


def test_coverage_is_read_from_the_inspector():
    int8 = 'Thirty-two wide channel vectorized row major Int8 format'
    layers = [
        described('Reformatting CopyNode for Input Tensor 0 to d', int8, 'Reformat', Metadata='[ONNX Layer: d]'),
        described('a + a_relu', int8),
        described('fused', int8, Metadata='[ONNX Layer: b]\x1f[ONNX Layer: c#1]'),
        described('d', 'Row major linear FP32'),
        dict(Name='e', LayerType='Constant', Inputs=[]),
    ]
    found = integer_coverage(layers, ['a', 'b', 'c#1', 'c', 'd', 'e'])
    assert (found.integer, found.float) == (['a', 'b', 'c#1'], ['c', 'd', 'e'])
    with pytest.raises(PTQError, match='profilingVerbosity=detailed'):
        integer_coverage(['a', 'b'], ['a'])


@pytest.fixture
def tensorrt():
    try:
        TensorRT.check()
    except PTQError as error:
        pytest.skip(str(error))


@pytest.mark.tensorrt
def test_an_engine_computes_what_is_simulated(tensorrt, checkpoint, tmp_path):
    detector = load_quantized(checkpoint)
    path = TensorRT.export(detector, tmp_path, SHAPE)
    assert path == tmp_path / 'model.engine'
    engine = open_model(path)
    assert min(difference(detector, engine, image(seed)) for seed in range(3)) < 1e-3
    coverage = engine.coverage()
    assert sorted(coverage.integer + coverage.float) == sorted(engine.meta['layers']) and coverage.integer


@pytest.mark.tensorrt
def test_an_engine_takes_any_number_of_images(tensorrt, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr('mmdet_ptq.deploy.tensorrt.runtime.MAX_BATCH', 2)
    detector = load_quantized(checkpoint)
    engine = open_model(TensorRT.export(detector, tmp_path, SHAPE, dynamic_batch=True))
    x = torch.cat([image(seed) for seed in range(3)]).numpy()
    alone = [engine(x[place : place + 1]) for place in range(3)]
    for place, output in enumerate(engine(x)):
        np.testing.assert_allclose(output, np.concatenate([part[place] for part in alone]), atol=1e-4)


@pytest.mark.tensorrt
def test_damaged_engines_are_refused(tensorrt, written, tmp_path):
    path = tmp_path / 'model.engine'
    path.write_bytes(b'damaged')
    with pytest.raises(PTQError, match='lacks the'):
        open_model(path)
    (tmp_path / 'model.onnx').write_bytes(written[0].read_bytes())
    with pytest.raises(PTQError, match='is damaged'):
        open_model(path)
