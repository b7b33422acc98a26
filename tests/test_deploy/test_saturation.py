"""Sums of 8-bit products on x86 processors without VNNI, which add them in pairs in 16 bits."""
import json
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdet_ptq.deploy import export_onnx, open_model, settle_biases
from mmdet_ptq.deploy.runtimes import base
from mmdet_ptq.deploy.runtimes.base import SAFE_CODE, worst_case
from mmdet_ptq.deploy.runtimes.onnxruntime import EXACT_SUMS, OnnxRuntime
from mmdet_ptq.testing import tiny_quantized
from mmdet_ptq.wrapping import freeze_weights

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
x86 = pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='the instruction is one of x86')
SHAPE = (1, 3, 64, 64)
# input channels, groups, kernel; each goes through kernels of its own
CONVOLUTIONS = {'dense': (16, 1, 3), 'pointwise': (16, 1, 1), 'image': (3, 1, 3), 'depthwise': (16, 16, 3)}
EXACT = {f'{kind}-{codes}-7' for kind in CONVOLUTIONS for codes in ('extreme', 'random')}
EXACT_DEPTHWISE = {'depthwise-extreme-8', 'depthwise-random-8'}

# without our package: torch takes minutes to import in an emulator
ONNXRUNTIME = f"""
import json, sys
import numpy as np
import onnxruntime
wrong = dict()
for option in '0', '1':
    wrong[option] = []
    for case, path in json.loads(sys.argv[1]).items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry({EXACT_SUMS!r}, option)
        session = onnxruntime.InferenceSession(path + '.onnx', options, providers=['CPUExecutionProvider'])
        with np.load(path + '.npz') as data:
            if (session.run(None, dict(x=data['x']))[0] != data['y']).any():
                wrong[option].append(case)
print(json.dumps(wrong))
"""
OPENVINO = """
import json, sys
import numpy as np
import openvino
wrong, kernels = [], []
for case, path in json.loads(sys.argv[1]).items():
    options = dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=1)
    compiled = openvino.Core().compile_model(openvino.convert_model(path + '.onnx'), 'CPU', options)
    kernels += [info['primitiveType'].astype(str) for info in
                (op.get_rt_info() for op in compiled.get_runtime_model().get_ops())
                if info['layerType'].astype(str) == 'Convolution']
    with np.load(path + '.npz') as data:
        if (compiled([data['x']])[0] != data['y']).any():
            wrong.append(case)
print(json.dumps([wrong, kernels]))
"""
OPENVINO_SATURATES = 'from mmdet_ptq.deploy.runtimes.openvino import OpenVino; print(str(OpenVino.saturates()).lower())'


def convolve(x, weight, groups):
    """Exact, in int64; zeros around the image."""
    size, pad = weight.shape[-1], weight.shape[-1] // 2
    x = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
    windows = windows.reshape(1, groups, -1, *windows.shape[2:])
    weight = weight.astype(np.int64).reshape(groups, -1, *weight.shape[1:])
    return np.einsum('ngihwkl,goikl->ngohw', windows, weight).reshape(1, -1, *windows.shape[3:5])


def write_case(path, kind, codes, bits):
    channels, groups, size = CONVOLUTIONS[kind]
    random = np.random.default_rng(0)
    top, shape = 2**(bits - 1) - 1, (16, channels // groups, size, size)
    if codes == 'extreme':
        x, weight = np.full((1, channels, 8, 8), 255, np.uint8), np.full(shape, top, np.int8)
        weight[1::2] = -top - 1
    else:
        x = random.integers(0, 256, (1, channels, 8, 8), np.uint8)
        weight = random.integers(-top - 1, top + 1, shape, np.int8)
    sums = convolve(x, weight, groups)
    step = np.float32(np.abs(sums).max() / 120)
    y = np.clip(np.rint(sums * 0.125 / (step * 0.125)) + 128, 0, 255).astype(np.uint8)
    constants = dict(half=np.float32(0.5), zero=np.uint8(0), middle=np.uint8(128), weight=weight,
                     scales=np.full(16, 0.25, np.float32), zeros=np.zeros(16, np.int8), step=step * np.float32(0.125))
    graph = helper.make_graph([
        helper.make_node('DequantizeLinear', ['x', 'half', 'zero'], ['values']),
        helper.make_node('DequantizeLinear', ['weight', 'scales', 'zeros'], ['kernel'], axis=0),
        helper.make_node('Conv', ['values', 'kernel'], ['sums'], group=groups, pads=[size // 2] * 4),
        helper.make_node('QuantizeLinear', ['sums', 'step', 'middle'], ['y'])], 'case',
        [helper.make_tensor_value_info('x', TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info('y', TensorProto.UINT8, y.shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10), f'{path}.onnx')
    np.savez(f'{path}.npz', x=x, y=y)


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp('cases'), {}
    for kind in CONVOLUTIONS:
        for codes in ('extreme', 'random'):
            for bits in (8, 7):
                paths[f'{kind}-{codes}-{bits}'] = str(folder / f'{kind}-{codes}-{bits}')
                write_case(paths[f'{kind}-{codes}-{bits}'], kind, codes, bits)
    return paths


def answer(code, argument='', before=(), **environment):
    done = subprocess.run([*before, sys.executable, '-c', code, argument], capture_output=True, text=True, timeout=280,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module', params=[8, 7], ids=['8-bits', '7-bits'])
def detector(request):
    """A head that several levels share: every use needs exact kernels."""
    detector, structure = tiny_quantized('retinanet', dict(
        preset='w8a8_observe', weights=dict(bits=request.param), dataflow='full',
        activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))))
    settle_biases(detector, structure)
    freeze_weights(detector)
    return detector, request.param


def test_two_products_of_safe_codes_fit_into_16_bits():
    image, weight, total = worst_case()
    assert 2 * int(image.max()) * SAFE_CODE <= 2**15 - 1 < 2 * int(image.max()) * (SAFE_CODE + 1)
    assert 2 * int(image.max()) * int(weight.max()) > 2**15 - 1
    assert (convolve(image, weight, 1) == total).all()


@x86
@pytest.mark.parametrize('instructions', ['AVX2', pytest.param('AVX512_CORE', marks=pytest.mark.slow)])
def test_openvino_saturates_with_8_bits_and_not_with_7(cases, instructions):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    wrong, kernels = answer(OPENVINO, json.dumps(cases), ONEDNN_MAX_CPU_ISA=instructions)
    assert set(wrong) == set(cases) - EXACT - EXACT_DEPTHWISE
    # a float convolution would have been right, too
    assert len(kernels) == len(cases) and all(kernel.endswith('_I8') for kernel in kernels)


@x86
def test_openvino_is_found_to_saturate():
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    assert answer(OPENVINO_SATURATES, ONEDNN_MAX_CPU_ISA='AVX2') is True


def test_openvino_warns_once_of_weights_that_saturate(detector, tmp_path, monkeypatch):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    from mmdet_ptq.deploy.runtimes.openvino import OpenVino
    detector, bits = detector
    path, said = OpenVino.export(detector, tmp_path, SHAPE), []
    monkeypatch.setattr(base, 'print_log', lambda text, *_: said.append(text))
    base.warn_once.cache_clear()
    monkeypatch.setattr(OpenVino, 'saturates', staticmethod(lambda: False))
    open_model(path, threads=1)
    assert not said
    monkeypatch.setattr(OpenVino, 'saturates', staticmethod(lambda: True))
    for _ in range(2):
        open_model(path, threads=1)
    assert len(said) == (1 if bits == 8 else 0)
    assert all('`ptq.weights.bits=7`' in text for text in said)


def test_onnxruntime_takes_exact_kernels_where_it_saturates(detector, tmp_path, monkeypatch):
    detector, bits = detector
    path, saturates_here = tmp_path / 'model.onnx', OnnxRuntime.saturates()
    export_onnx(detector, path, SHAPE)
    image = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    outputs, types = {}, {}
    for saturates in (False, True):
        monkeypatch.setattr(OnnxRuntime, 'saturates', staticmethod(lambda saturates=saturates: saturates))
        model = open_model(path, threads=1)
        outputs[saturates] = model(image)
        types[saturates] = convolution_weights(model, tmp_path / 'optimized.onnx')
    assert types[False] == {TensorProto.INT8}
    # weights of 7 bits keep the faster kernels
    assert types[True] == {TensorProto.UINT8 if bits == 8 and x86_kernels() else TensorProto.INT8}
    if bits == 7 or not saturates_here:
        for ours, theirs in zip(outputs[True], outputs[False], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_product_of_activations_shares_no_weight():
    pytest.importorskip('onnx_ir')
    from mmdet_ptq.deploy.onnx_own_weights import with_own_weights
    graph = helper.make_graph(
        [helper.make_node('MatMul', ['x', 'x'], ['once']), helper.make_node('MatMul', ['once', 'x'], ['y'])], 'case',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, [2, 2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10).SerializeToString()
    assert with_own_weights(model) is model


def convolution_weights(model, path):
    model._session(str(path))
    graph = onnx.load(path).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {stored[node.input[3]] for node in graph.node if node.op_type == 'QLinearConv'}


def x86_kernels():
    return platform.machine() in ('x86_64', 'AMD64')


@x86
@pytest.mark.slow
def test_onnxruntime_is_exact_on_avx2(cases):
    """valgrind runs the program on a processor with AVX2 and neither AVX512 nor VNNI."""
    valgrind = shutil.which('valgrind')
    if valgrind is None:
        pytest.skip('needs valgrind to emulate a processor without VNNI')
    wrong = answer(ONNXRUNTIME, json.dumps(cases), before=[valgrind, '--tool=none', '-q'])
    assert set(wrong['0']) == set(cases) - EXACT - EXACT_DEPTHWISE
    assert wrong['1'] == []
