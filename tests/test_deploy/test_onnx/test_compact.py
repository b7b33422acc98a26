import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mmdet_ptq.deploy import export_onnx, model_bytes, open_model, settle_biases
from mmdet_ptq.deploy.network.meta import read_meta, write_meta
from mmdet_ptq.deploy.onnx import compact as onnx_names
from mmdet_ptq.deploy.onnx.nodes import CODES
from mmdet_ptq.deploy.onnx.weight_bytes import weight_bytes
from mmdet_ptq.deploy.openvino.compact import strip_layout
from mmdet_ptq.deploy.runtime import get_runtime
from mmdet_ptq.testing import tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.wrapping import freeze_weights

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
SHAPE = (1, 3, 64, 64)


@pytest.fixture(scope='module')
def detector():
    detector, structure = tiny_quantized('retinanet', dict(preset='w8a8_observe', activations=MIN_MAX, dataflow='full'))
    settle_biases(detector, structure)
    freeze_weights(detector)
    return detector


@pytest.fixture(scope='module')
def compact(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp('onnx') / 'compact.onnx'
    export_onnx(detector, path, SHAPE)
    return path


@pytest.fixture(scope='module')
def pair(detector, compact):
    """The same model with every name and constant, and compact."""
    plain = compact.with_name('plain.onnx')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_names, 'compact', lambda model, calls, share=True: None)
        export_onnx(detector, plain, SHAPE)
    return plain, compact


def image(detector):
    return detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs'].numpy()


@pytest.mark.thorough
def test_a_compact_model_computes_the_same_from_fewer_bytes(detector, pair):
    plain, compact = (open_model(path, threads=1) for path in pair)
    for first, second in zip(plain(image(detector)), compact(image(detector)), strict=True):
        np.testing.assert_array_equal(first, second)
    assert plain.coverage() == compact.coverage() and compact.coverage().integer
    assert plain.meta == compact.meta
    sizes = [path.stat().st_size - weight_bytes(path) for path in pair]
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.thorough
def test_what_somebody_reads_keeps_its_name(pair):
    plain, compact = (onnx.load(path).graph for path in pair)
    assert [value.name for value in compact.input] == ['input']
    assert [value.name for value in compact.output] == [value.name for value in plain.output]
    codes = [[out for node in graph.node for out in node.output if out.endswith(CODES)] for graph in (plain, compact)]
    assert codes[0] == codes[1] and len(codes[0]) > 10
    calls = read_meta(onnx.load(pair[1]).metadata_props[0].value)['layers']
    assert {node.name for node in compact.node} == {*calls, ''}


def test_equal_constants_and_products_are_not_stored(compact):
    graph = onnx.load(compact).graph
    stored = [(entry.data_type, tuple(entry.dims), entry.raw_data) for entry in graph.initializer]
    assert len(set(stored)) == len(stored)
    constants, producers = {e.name for e in graph.initializer}, {n.output[0]: n for n in graph.node}
    biases = [producers[node.input[2]] for node in graph.node if node.op_type == 'Conv']
    assert biases and all(
        producers[bias.input[1]].op_type == 'Mul' for bias in biases if bias.input[1] not in constants
    )
    assert any(bias.input[1] not in constants for bias in biases)


def test_names_inside_bodies_are_not_given_again():
    x = ir.Value(name='input', type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    flag = ir.Value(name='flag', type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    outer = ir.node('Neg', [x], name='negate')
    outer.outputs[0].name = 'long name'
    bodies = []
    for op_type in ('Abs', 'Relu'):
        inner = ir.node(op_type, [outer.outputs[0]])
        inner.outputs[0].name = 'a'
        bodies.append(ir.Graph([], inner.outputs, nodes=[inner], name=op_type))
    choice = ir.node('If', [flag], dict(then_branch=bodies[0], else_branch=bodies[1]))
    choice.outputs[0].name = 'output'
    graph = ir.Graph([x, flag], choice.outputs, nodes=[outer, choice], opset_imports={'': 21})
    onnx_names.shorten_names(graph, [])
    assert outer.outputs[0].name == 'b' and outer.name is None and choice.outputs[0].name == 'output'


def test_default_attributes_only_are_dropped():
    x, w = (ir.Value(name=name) for name in 'xw')
    node = ir.node(
        'Conv',
        [x, w],
        dict(group=1, strides=[1, 1], dilations=[1, 2], pads=[0, 0, 0, 1], auto_pad='NOTSET', kernel_shape=[1, 1]),
    )
    onnx_names.drop_defaults(ir.Graph([x, w], node.outputs, nodes=[node]))
    assert set(node.attributes) == {'dilations', 'pads', 'kernel_shape'}


def test_meta_survives_and_older_ones_are_read():
    meta = dict(format='f', layers={'a.b': 'a.b', 'a.b#1': 'a.b', 'c': 'other'})
    assert read_meta(write_meta(meta)) == meta
    assert write_meta(meta).count('a.b') == 2
    assert read_meta('{"layers": {"a.b#1": "a.b"}}') == {'layers': {'a.b#1': 'a.b'}}


def test_weight_bytes_of_a_float_and_an_integer_model(compact, tmp_path):
    detector = tiny_detector('retinanet').eval()
    export_onnx(detector, tmp_path / 'float.onnx', SHAPE)
    biases = sum(
        np.prod(entry.dims)
        for entry in onnx.load(tmp_path / 'float.onnx').graph.initializer
        if len(entry.dims) == 1 and entry.data_type == onnx.TensorProto.FLOAT
    )
    weights = sum(m.weight.numel() for m in detector.modules() if hasattr(m, 'kernel_size') and hasattr(m, 'weight'))
    assert 4 * weights <= weight_bytes(tmp_path / 'float.onnx') <= 4 * (weights + biases)
    assert weights < weight_bytes(compact) < 0.5 * weight_bytes(tmp_path / 'float.onnx')


@pytest.mark.slow
def test_openvino_gets_the_same_numbers_in_fewer_bytes(detector, tmp_path, monkeypatch):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    from mmdet_ptq.deploy.openvino import runtime as openvino

    small = get_runtime('openvino').export(detector, tmp_path / 'small', SHAPE)
    monkeypatch.setattr(onnx_names, 'compact', lambda model, calls, share=True: None)
    monkeypatch.setattr(openvino, 'compact', lambda model, calls, share=True: None)
    monkeypatch.setattr(openvino, 'strip_layout', lambda path: None)
    plain = get_runtime('openvino').export(detector, tmp_path / 'plain', SHAPE)
    assert model_bytes(small) < 0.8 * model_bytes(plain)
    first, second = open_model(plain, threads=1), open_model(small, threads=1)
    assert first.coverage() == second.coverage() and second.coverage().integer
    assert first.meta == second.meta
    for a, b in zip(first(image(detector)), second(image(detector)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stripping_keeps_text(tmp_path):
    (tmp_path / 'm.xml').write_text('<a>\n\t<b x="1 2">\n\t\t<c> 5 </c>\n\t</b>\n</a>\n')
    strip_layout(tmp_path / 'm.xml')
    assert (tmp_path / 'm.xml').read_text().endswith('<a><b x="1 2"><c> 5 </c></b></a>')
