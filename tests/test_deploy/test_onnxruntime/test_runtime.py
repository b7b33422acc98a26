"""ONNX Runtime as one of the runtimes: what it reads, what it computes in integers, and what it says where it fails."""

from __future__ import annotations

import numpy as np
import pytest

from mmdet_ptq.deploy import get_runtime, open_model
from mmdet_ptq.deploy.network.meta import write_meta
from mmdet_ptq.deploy.network.seal import seal
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer
from mmdet_ptq.wrapping import Structure
from mmdet_ptq.wrapping.structure import ActivationStructure

onnx = pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
onnxruntime = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from mmdet_ptq.deploy.onnxruntime.runtime import OnnxRuntime  # noqa: E402

SHAPE = [1, 4, 6, 5]
META = dict(
    format='mmdet_ptq.onnx',
    version='0',
    runtime='onnxruntime',
    input_shape=SHAPE,
    dynamic_batch=True,
    outputs=[0],
    raw_shapes=[SHAPE[1:]],
    layers={},
    saturating=[],
)
RNG = np.random.default_rng(0)
CONSTANTS = dict(
    s=np.float32(0.05),
    z=np.uint8(128),
    w=RNG.integers(-63, 64, (4, 4, 1, 1)).astype(np.int8),
    ws=np.full(4, 0.01, np.float32),
    wz=np.zeros(4, np.int8),
    b=RNG.integers(-500, 500, 4).astype(np.int32),
    bs=np.full(4, np.float32(0.05) * np.float32(0.01), np.float32),
    m=RNG.integers(-63, 64, (5, 3)).astype(np.int8),
    ms=np.float32(0.01),
    mz=np.int8(0),
)


def written(path, nodes, meta=META, inputs=(('input', ['n', *SHAPE[1:]]),)):
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        'detector',
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in CONSTANTS.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
    helper.set_model_props(model, dict(mmdet_ptq=write_meta(meta)))
    path.write_bytes(seal(model.SerializeToString()))
    return path


def pair(source, target):
    return [
        helper.make_node('QuantizeLinear', [source, 's', 'z'], [f'{target}_codes'], f'{target}:codes'),
        helper.make_node('DequantizeLinear', [f'{target}_codes', 's', 'z'], [target], f'{target}:value'),
    ]


def layers():
    """A convolution between quantizers, another behind which nothing is quantized, and a product of both kinds."""
    return [
        *pair('input', 'x'),
        helper.make_node('DequantizeLinear', ['w', 'ws', 'wz'], ['wd'], axis=0),
        helper.make_node('DequantizeLinear', ['b', 'bs'], ['bd'], axis=0),
        helper.make_node('Conv', ['x', 'wd', 'bd'], ['c'], 'backbone.conv'),
        *pair('c', 'd'),
        helper.make_node('Conv', ['d', 'wd'], ['e'], 'backbone.conv#1'),
        helper.make_node('DequantizeLinear', ['m', 'ms', 'mz'], ['md']),
        helper.make_node('MatMul', ['d', 'md'], ['f'], 'head'),
        helper.make_node('ReduceMax', ['e'], ['g'], keepdims=0),
        helper.make_node('Add', ['f', 'g'], ['y']),
    ]


CALLS = {
    'backbone.conv': 'backbone.conv',
    'backbone.conv#1': 'backbone.conv',
    'head': 'head',
    'neck': 'neck',
    'he': 'he',
}


def test_images_of_any_number_are_computed(tmp_path):
    path = written(tmp_path / 'model.onnx', [helper.make_node('Neg', ['input'], ['y'])])
    model = open_model(path, threads=2)
    assert type(model) is OnnxRuntime is get_runtime('onnxruntime')
    assert model.meta == META and model.sized is True and model.parts == {}
    for count in (1, 3):
        image = RNG.standard_normal((count, *SHAPE[1:])).astype(np.float32)
        (found,) = model(image)
        np.testing.assert_array_equal(found, -image)


def test_coverage_is_what_its_own_graph_computes_in_integers(tmp_path):
    model = OnnxRuntime(written(tmp_path / 'model.onnx', layers(), dict(META, layers=CALLS, products=['attention'])))
    found = model.coverage()
    assert {'backbone.conv', 'head'} <= set(found.integer)
    # of what is not in the graph nothing is computed in integers
    assert set(found.float) == {'backbone.conv#1', 'neck', 'he', 'attention'}
    assert not list(tmp_path.glob('optimized*'))


def test_a_model_that_asks_for_the_size_is_told_that_of_its_tensor(tmp_path):
    nodes = [
        helper.make_node('ReduceSum', ['input'], ['total'], keepdims=0),
        helper.make_node('Add', ['size', 'total'], ['y']),
    ]
    inputs = (('input', ['n', *SHAPE[1:]]), ('size', ['n', 2]))
    meta = dict(META, end2end=True, inputs=[SHAPE, [1, 2]])
    model = OnnxRuntime(written(tmp_path / 'model.onnx', nodes, meta, inputs))
    image = np.zeros((2, *SHAPE[1:]), np.float32)
    np.testing.assert_array_equal(model(image)[0], [[6, 5], [6, 5]])
    np.testing.assert_array_equal(model(image, np.float32([[3, 2], [1, 4]]))[0], [[3, 2], [1, 4]])


def test_what_it_cannot_run_is_told_in_one_line(tmp_path):
    model = OnnxRuntime(written(tmp_path / 'model.onnx', [helper.make_node('Neg', ['input'], ['y'])]))
    told = r'^onnxruntime cannot run the model on what has the shapes \[\[1, 3, 6, 5\]\]: .*\.$'
    with pytest.raises(PTQError, match=told) as error:
        model(np.zeros((1, 3, 6, 5), np.float32))
    assert '\n' not in str(error.value) and len(str(error.value)) < 400


def test_a_graph_that_it_refuses_is_told_in_one_line(tmp_path):
    path = written(tmp_path / 'model.onnx', [helper.make_node('NoSuchOperator', ['input'], ['y'])])
    with pytest.raises(PTQError, match=r"^ONNX Runtime cannot open '.*model\.onnx': .*NoSuchOperator") as error:
        OnnxRuntime(path)
    assert '\n' not in str(error.value)


def test_a_changed_byte_is_noticed(tmp_path):
    path = written(tmp_path / 'model.onnx', [helper.make_node('Neg', ['input'], ['y'])])
    path.write_bytes(path.read_bytes().replace(b'Neg', b'Abs'))
    with pytest.raises(PTQError, match='changed since the export'):
        OnnxRuntime(path)


def test_processors_are_told_of_where_its_cpu_kernels_compute(tmp_path, monkeypatch):
    nodes = [helper.make_node('Neg', ['input'], ['y'])]
    quantized = dict(META, space_to_depth={}, saturating=['conv', 'head'])
    model = OnnxRuntime(written(tmp_path / 'model.onnx', nodes, quantized))
    monkeypatch.setattr(OnnxRuntime, 'saturates', staticmethod(lambda: True))
    assert 'the products of 2 of its layers saturate' in model.remark()

    class Session:
        def get_providers(self):
            return ['CUDAExecutionProvider', 'CPUExecutionProvider']

    model.session = Session()
    assert model.remark() == ''


def test_why_layers_stay_float_is_told_of_checkpoints_without_dataflow():
    assert OnnxRuntime.dataflow == 'balanced'
    told = OnnxRuntime.explain_float(Structure())
    assert 'calibrated without `ptq.dataflow`' in told and "`ptq.export=['onnxruntime']`" in told
    assert OnnxRuntime.explain_float(Structure(sites=[dict(activation='head:add')])) == ''


def test_formats_of_ones_own_are_refused():
    structure = Structure(activations={'a': ActivationStructure(AffineQuantizer(4).spec(), 1)})
    OnnxRuntime.check_formats(structure)
    structure.activations['b'] = ActivationStructure(LogAffineQuantizer(4).spec(), 1)
    with pytest.raises(PTQError, match='the activation b has the format'):
        OnnxRuntime.check_formats(structure)
