import json
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmdet_ptq.deploy import export_onnx, get_runtime, open_model, settle_biases
from mmdet_ptq.deploy.onnx import export as onnx_export
from mmdet_ptq.deploy.onnx import space_to_depth as module
from mmdet_ptq.deploy.onnx.export import model_meta
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.testing import tiny_batch, tiny_detector, tiny_model_cfg, tiny_quantized
from mmdet_ptq.testing.models import MODELS
from mmdet_ptq.wrapping import freeze_weights

ort = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
ir = pytest.importorskip('onnx_ir')
MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
FOCUS = [(0, 0), (1, 0), (0, 1), (1, 1)]  # the order of mmdet's Focus
SHAPE = (1, 3, 64, 64)
CHANNELS, OUTPUTS = 3, 5


class Builder:
    """Nodes and constants of a small graph."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, array):
        self.constants.append(numpy_helper.from_array(np.asarray(array), f'c{len(self.constants)}'))
        return self.constants[-1].name

    def add(self, op_type, inputs, **attributes):
        name = attributes.pop('name', f'n{len(self.nodes)}')
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def slice(self, x, starts, ends, axes, step):
        return self.add('Slice', [x, *map(self.constant, (starts, ends, axes, [step] * len(axes)))])


def space_to_depth(
    offsets=tuple(FOCUS),
    step=2,
    size=(12, 16),
    batch='batch',
    quantizer='codes',
    weight='int8',
    nested=True,
    end=2**63 - 1,
    reader=False,
    skew=None,
    **attributes,
):
    """A model that convolves the slices of an image.

    Args:
        offsets: Row and column at which each slice begins.
        quantizer: None, 'codes' (clipped after QuantizeLinear), 'values' (before) or 'channels' (a scale each).
        weight: 'int8' or 'float'.
        nested: Whether rows and columns are sliced by a node each.
        reader: Whether the concatenation is an output, too.
        skew: Step of the columns, where it is another one.
    """
    b, rng = Builder(), np.random.default_rng(0)
    attributes = dict(dict(strides=[1, 1], pads=[1, 1, 1, 1]), **attributes)
    parts = []
    for dy, dx in offsets:
        if nested:
            rows = b.slice('input', [dy], [end], [2], step)
            parts.append(b.slice(rows, [dx], [end], [-1], skew or step))
        else:
            parts.append(b.slice('input', [dy, dx], [end] * 2, [2, 3], step))
    x = concat = b.add('Concat', parts, axis=1)
    if quantizer == 'channels':
        pair = [
            b.constant(np.full(len(offsets) * CHANNELS, 0.05, np.float32)),
            b.constant(np.full(len(offsets) * CHANNELS, 9, np.uint8)),
        ]
        x = b.add('DequantizeLinear', [b.add('QuantizeLinear', [x, *pair], axis=1), *pair], axis=1)
    elif quantizer:
        pair = [b.constant(np.float32(0.05)), b.constant(np.uint8(31))]
        if quantizer == 'values':
            x = b.add('Max', [x, b.constant(np.float32(-31 * 0.05))])
            x = b.add('Min', [x, b.constant(np.float32(32 * 0.05))])
        x = b.add('QuantizeLinear', [x, *pair], name='stem:codes')
        if quantizer == 'codes':
            x = b.add('Clip', [x, b.constant(np.uint8(0)), b.constant(np.uint8(63))])
        x = b.add('DequantizeLinear', [x, *pair])
    shape = (OUTPUTS, len(offsets) * CHANNELS // attributes.get('group', 1), 3, 3)
    if weight == 'int8':
        w = b.add(
            'DequantizeLinear',
            [
                b.constant(rng.integers(-127, 128, shape, np.int8)),
                b.constant(rng.uniform(0.01, 0.02, OUTPUTS).astype(np.float32)),
            ],
            axis=0,
        )
    else:
        w = b.constant(rng.normal(size=shape).astype(np.float32))
    out = b.add('Conv', [x, w, b.constant(rng.normal(size=OUTPUTS).astype(np.float32))], name='stem', **attributes)
    outputs = [out, concat] if reader else [out]
    graph = helper.make_graph(
        b.nodes,
        'graph',
        [helper.make_tensor_value_info('input', TensorProto.FLOAT, [batch, CHANNELS, *size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        b.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def fold(proto, into_kernel=True):
    model = ir.from_proto(proto)
    found = module.fold_space_to_depth(model.graph, into_kernel)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return found, proto


def answers(proto, image):
    return ort.InferenceSession(proto.SerializeToString(), providers=['CPUExecutionProvider']).run(
        None, {'input': image}
    )


def image_of(size, batch=2):
    return np.random.default_rng(1).normal(size=(batch, CHANNELS, *size)).astype(np.float32)


def operations(proto):
    return Counter(node.op_type for node in proto.graph.node)


FOLDED = {
    'focus': dict(),
    'other-order': dict(offsets=[(1, 1), (0, 1), (0, 0), (1, 0)]),
    'both-axes-in-one-slice': dict(nested=False),
    'negative-bounds': dict(end=12, size=(12, 12), nested=False),
    'fixed-batch': dict(batch=2),
    'threes': dict(offsets=list(product(range(3), range(3)))[::-1], step=3, size=(12, 18)),
    'values-clipped': dict(quantizer='values'),
    'float-input': dict(quantizer=None),
    'float-weight': dict(weight='float'),
    'float': dict(quantizer=None, weight='float'),
    'stride': dict(strides=[2, 1], pads=[0, 1, 2, 0]),
    'odd-output': dict(strides=[2, 2], size=(14, 18)),
    'defaults': dict(strides=[1, 1], pads=[0, 0, 0, 0], kernel_shape=[3, 3]),
}


@pytest.mark.parametrize('into_kernel', [True, False], ids=['kernel', 'operation'])
@pytest.mark.parametrize('case', FOLDED.values(), ids=FOLDED)
def test_a_convolution_of_the_whole_image_computes_the_same(case, into_kernel):
    proto = space_to_depth(**case)
    found, folded = fold(proto, into_kernel)
    quantized = case.get('quantizer', 'codes') is not None
    offsets = list(case.get('offsets', FOCUS))
    assert found == [module.Folded('stem', 'stem' if quantized else None, offsets)]
    assert not operations(folded).keys() & {'Slice', 'Concat'}
    assert operations(folded)['SpaceToDepth'] == (not into_kernel)
    assert folded.graph.node[-1].op_type == 'Conv' and folded.graph.node[-1].output[0] == 'stem'
    image = image_of(case.get('size', (12, 16)))
    for ours, theirs in zip(answers(proto, image), answers(folded, image), strict=True):
        assert ours.std() > 0.1
        np.testing.assert_allclose(theirs, ours, atol=1e-4 * ours.std(), rtol=1e-5)


LEFT = {
    'odd-size': dict(size=(13, 16)),
    'indivisible': dict(offsets=list(product(range(3), range(3))), step=3, size=(12, 16)),
    'unknown-size': dict(size=('height', 16)),
    'missing-offset': dict(offsets=FOCUS[:3]),
    'offset-twice': dict(offsets=[(0, 0), (0, 0), (0, 1), (1, 1)]),
    'not-full-extent': dict(end=10, nested=False, size=(12, 12)),
    'unequal-steps': dict(skew=4),
    'another-reader': dict(reader=True),
    'grouped': dict(group=2, outputs=None),
    'dilated': dict(dilations=[2, 2]),
    'automatic-padding': dict(auto_pad='SAME_UPPER', pads=None),
    'scale-per-channel': dict(quantizer='channels'),
    'single-slice': dict(offsets=[(0, 0)], step=1),
}


@pytest.mark.parametrize('case', LEFT.values(), ids=LEFT)
def test_what_does_not_fit_is_left_alone(case, monkeypatch):
    case = dict(case)
    if 'outputs' in case:
        monkeypatch.setitem(globals(), 'OUTPUTS', 4)
        del case['outputs']
    proto = space_to_depth(**case)
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert module.fold_space_to_depth(model.graph, True) == module.fold_space_to_depth(model.graph, False) == []
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_crop_before_the_slices_stays():
    proto = space_to_depth(quantizer=None, size=(10, 16))
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 12
    crop = [numpy_helper.from_array(np.array([number]), f'crop_{number}') for number in (1, 11, 2)]  # start, end, axis
    for node in proto.graph.node:
        node.input[:] = ['cropped' if name == 'input' else name for name in node.input]
    proto.graph.node.insert(
        0, helper.make_node('Slice', ['input', *(tensor.name for tensor in crop)], ['cropped'], name='crop')
    )
    proto.graph.initializer.extend(crop)
    proto = onnx.shape_inference.infer_shapes(proto)
    found, folded = fold(proto)
    assert [fold.layer for fold in found] == ['stem'] and operations(folded)['Slice'] == 1
    for ours, theirs in zip(answers(proto, image_of((12, 16))), answers(folded, image_of((12, 16))), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_shapes_of_the_moved_quantizer_are_the_images():
    model = ir.from_proto(space_to_depth(batch=2))
    module.fold_space_to_depth(model.graph, True)
    shapes = {
        node.op_type: [tuple(value.shape) for value in node.inputs[:1] + node.outputs[:1]]
        for node in model.graph
        if node.op_type in ('QuantizeLinear', 'Clip')
    }
    assert set(map(tuple, shapes.values())) == {((2, CHANNELS, 12, 16),) * 2}
    stem = next(node for node in model.graph if node.op_type == 'Conv')
    assert tuple(stem.inputs[1].shape) == tuple(stem.inputs[1].producer().inputs[0].shape) == (OUTPUTS, CHANNELS, 6, 6)
    assert tuple(stem.outputs[0].shape) == (2, OUTPUTS, 6, 8)


@pytest.mark.parametrize('into_kernel', [True, False], ids=['kernel', 'operation'])
def test_another_reader_of_the_weight_keeps_the_old_one(into_kernel):
    proto = space_to_depth(quantizer=None)
    weight = next(node for node in proto.graph.node if node.op_type == 'DequantizeLinear')
    proto.graph.output.append(helper.make_tensor_value_info('sum', TensorProto.FLOAT, []))
    proto.graph.node.append(helper.make_node('ReduceSum', [weight.output[0]], ['sum'], keepdims=0))
    proto.graph.output.append(helper.make_tensor_value_info('codes', TensorProto.INT8, [None] * 4))
    proto.graph.node.append(helper.make_node('Identity', [weight.input[0]], ['codes']))
    found, folded = fold(proto, into_kernel)
    image = image_of((12, 16))
    assert len(found) == 1
    for ours, theirs in zip(answers(proto, image), answers(folded, image), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-4)


def small_yolox():
    """Focus, one stage and a head of one level: quick to export."""
    cfg = tiny_model_cfg('yolox')
    cfg['backbone'].update(arch_ovewrite=[[64, 128, 3, True, False]], out_indices=(1,), use_depthwise=False)
    cfg['neck'].update(in_channels=[16], use_depthwise=False)
    cfg['bbox_head'].update(strides=(4,), stacked_convs=1, use_depthwise=False)
    return cfg


@pytest.fixture(scope='module', autouse=True)
def small_detectors():
    cfg = small_yolox()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, 'yolox', lambda: cfg)
        yield


def both(export, monkeypatch):
    """What an export gives with and without the fold, of one graph that torch writes."""
    written = []

    def once(*args):
        if not written:
            written.append(exported(*args))
        return written[0].clone()

    exported = onnx_export.exported_program
    monkeypatch.setattr(onnx_export, 'exported_program', once)
    folded = export('folded')
    monkeypatch.setattr(module, 'fold_space_to_depth', lambda graph, into_kernel: [])
    return folded, export('plain')


@pytest.fixture(scope='module')
def yolox(tmp_path_factory):
    """A tiny YOLOX of 4 bits, exported with and without the fold."""
    detector, structure = tiny_quantized(
        'yolox', dict(preset='w8a8_observe', activations=dict(bits=4, **MIN_MAX), weights=dict(bits=4), dataflow='full')
    )
    settle_biases(detector, structure)
    freeze_weights(detector)
    folder = tmp_path_factory.mktemp('yolox')
    with pytest.MonkeyPatch.context() as patch:
        meta, _ = both(lambda name: export_onnx(detector, folder / f'{name}.onnx', SHAPE), patch)
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    return SimpleNamespace(detector=detector, folder=folder, meta=meta, image=image)


def test_an_exported_detector_answers_the_same_without_slices(yolox):
    folded, plain = (onnx.load(yolox.folder / f'{name}.onnx') for name in ('folded', 'plain'))
    assert operations(plain)['Slice'] - operations(folded)['Slice'] == 6 and operations(folded)['Slice'] == 0
    assert operations(folded)['SpaceToDepth'] == 1 and operations(plain)['SpaceToDepth'] == 0
    for ours, theirs in zip(*(answers(proto, yolox.image.numpy()) for proto in (plain, folded)), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_codes_of_the_stem_are_compared_in_the_order_of_the_slices(yolox):
    ((name, offsets),) = yolox.meta['space_to_depth'].items()
    assert [tuple(place) for place in offsets] == FOCUS
    assert model_meta(yolox.folder / 'folded.onnx') == json.loads(json.dumps(yolox.meta))
    agreements = [
        compare_codes(yolox.detector, yolox.folder / f'{kind}.onnx', yolox.image) for kind in ('folded', 'plain')
    ]
    assert agreements[0] == agreements[1]
    assert next(entry for entry in agreements[0] if entry.name == name).identical == 1


def test_an_integer_kernel_takes_the_stem(yolox):
    coverage = [open_model(yolox.folder / f'{name}.onnx', threads=1).coverage() for name in ('folded', 'plain')]
    assert coverage[0] == coverage[1] and 'backbone.stem.conv.conv' in coverage[0].integer


def test_a_float_detector_keeps_its_slices(tmp_path):
    meta = export_onnx(tiny_detector('yolox'), tmp_path / 'model.onnx', SHAPE)
    assert operations(onnx.load(tmp_path / 'model.onnx'))['Slice'] == 6 and 'space_to_depth' not in meta


@pytest.mark.thorough
def test_openvino_answers_the_same(tmp_path, monkeypatch):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    # narrow codes: OpenVINO's graph clips values before they are quantized
    detector, _ = tiny_quantized('yolox', dict(preset='w8a8_observe', activations=dict(bits=6, **MIN_MAX)))
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs'].numpy()
    folded, plain = (
        open_model(path, threads=1)
        for path in both(lambda name: get_runtime('openvino').export(detector, tmp_path / name, SHAPE), monkeypatch)
    )
    for ours, theirs in zip(folded(image), plain(image), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-4 * ours.std())
    assert folded.coverage() == plain.coverage() and folded.coverage().integer
