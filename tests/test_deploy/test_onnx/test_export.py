import copy
import json

import architectures
import numpy as np
import onnx
import pytest
import torch
from mmcv.ops import nms
from mmdet.models.detectors import SingleStageDetector
from onnx import numpy_helper
from torch import nn

from mmdet_ptq.deploy import (
    export_onnx,
    get_runtime,
    integer_arithmetic,
    integer_weight,
    open_model,
    settle_biases,
    with_runtime,
)
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs, check_exportable, nest_outputs, output_layout
from mmdet_ptq.deploy.onnx.export import model_meta
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.wrapping import float_weight, freeze_weights, quantized_weights
from mmdet_ptq.wrapping.state import only_read_tensors
from mmdet_ptq.wrapping.watching.tensors import tensors_in

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
FULL = dict(preset='w8a8_observe', activations=MIN_MAX, dataflow='full')
CASES = {
    'ssd-w8a8': ('ssd', dict(preset='w8a8_observe', activations=MIN_MAX)),
    'retinanet-w8a8-dataflow': ('retinanet', FULL),
    'yolox-w4a4-per-channel': (
        'yolox',
        dict(
            FULL,
            dataflow='per_channel',
            weights=dict(bits=4),
            activations=dict(bits=4, **MIN_MAX),
            head=dict(weights=dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer', location='median'))),
        ),
    ),
}
SHAPE = (1, 3, 64, 64)


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(case, id=name, marks=() if name == 'retinanet-w8a8-dataflow' else pytest.mark.thorough)
        for name, case in CASES.items()
    ],
)
def exported(request, tmp_path_factory):
    kind, ptq = request.param
    detector, structure = tiny_quantized(kind, ptq)
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    meta = export_onnx(detector, path, SHAPE)
    return detector, structure, path, meta


def image(detector):
    return detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']


@torch.no_grad()
def simulated(detector, x):
    return [t.numpy() for t in RawOutputs(detector)(x)]


def test_outputs_agree_with_the_simulation(exported):
    detector, _, path, _ = exported
    x = image(detector)
    for ours, theirs in zip(simulated(detector, x), open_model(path, threads=1)(x.numpy()), strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).mean() <= 0.001 * ours.std()
        assert np.abs(ours - theirs).max() <= 0.02 * ours.std()


def test_codes_are_the_same(exported):
    detector, structure, path, _ = exported
    found = compare_codes(detector, path, image(detector))
    assert {entry.name.split('@')[0] for entry in found} == set(structure.activations)
    for entry in found:
        assert entry.identical >= 0.999, entry


def test_weights_are_stored_as_their_codes(exported):
    detector, _, path, meta = exported
    graph, weights = onnx.load(path).graph, quantized_weights(detector)
    constants = {entry.name: entry for entry in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.name not in meta['layers']:
            continue
        name, value = meta['layers'][node.name], producers[node.input[1]].input[0]
        codes = weights[name].codes(float_weight(detector.get_submodule(name)))
        weight = integer_weight(weights[name].quantizer, codes)
        if value in constants:
            stored = numpy_helper.to_array(constants[value])
            assert stored.dtype == np.int8
            rows = node.op_type == 'Conv' or any(a.name == 'transB' and a.i for a in node.attribute)
            stored = stored if rows else stored.T
            np.testing.assert_array_equal(stored.reshape(len(weight.codes), -1), weight.integers().numpy())
        else:
            assert producers[value].op_type in ('Gather', 'Cast')
            assert constants[look_up_codes(value, producers, constants)].data_type == onnx.TensorProto.UINT4
    assert set(meta['layers'].values()) == set(weights)


def look_up_codes(value, producers, constants):
    """Name of the codes that a table is looked up with."""
    while value not in constants:
        node = producers[value]
        value = node.input[1] if node.op_type == 'Gather' else node.input[0]
    return value


def test_the_file_says_what_it_is_and_nothing_of_where_it_was_made(exported):
    detector, _, path, meta = exported
    model = onnx.load(path)
    assert model_meta(path) == json.loads(json.dumps(meta)) and meta['input_shape'] == list(SHAPE)
    assert model.producer_name == 'mmdet-ptq' and model.opset_import[0].version == 21
    assert [value.name for value in model.graph.input] == ['input']
    assert b'site-packages' not in path.read_bytes() and b'.py' not in path.read_bytes()
    onnx.checker.check_model(model, full_check=True)


def test_biases_are_int32(exported):
    _, _, path, _ = exported
    graph = onnx.load(path).graph
    producers = {node.output[0]: node for node in graph.node}
    types = {entry.name: entry.data_type for entry in graph.initializer}
    for node in graph.node:
        if node.op_type == 'Conv' and len(node.input) > 2 and producers[node.input[0]].op_type == 'DequantizeLinear':
            scale = producers[node.input[0]].input[1]
            if not next(e for e in graph.initializer if e.name == scale).dims:
                stored = producers[node.input[2]].input[0]
                widen = producers.get(stored)
                if widen is None:
                    assert types[stored] == onnx.TensorProto.INT32
                else:  # 16 bits hold it
                    assert widen.op_type == 'Cast' and widen.attribute[0].i == onnx.TensorProto.INT32
                    assert types[widen.input[0]] == onnx.TensorProto.INT16


def test_coverage_names_what_stays_float(exported):
    detector, _, path, meta = exported
    coverage = open_model(path, threads=1).coverage()
    assert sorted(coverage.integer + coverage.float) == sorted(meta['layers'])
    # with quantized outputs, every convolution computes in integers
    assert coverage.integer if detector.ptq.flow is None else not coverage.float


@pytest.mark.thorough
def test_an_expanded_model_computes_the_same(exported, tmp_path):
    detector, _, path, _ = exported
    if onnx.TensorProto.UINT4 not in {entry.data_type for entry in onnx.load(path).graph.initializer}:
        pytest.skip('its weights have more than 16 levels')
    export_onnx(detector, tmp_path / 'expanded.onnx', SHAPE, packed=False)
    assert (tmp_path / 'expanded.onnx').stat().st_size > path.stat().st_size
    x = image(detector).numpy()
    for packed, expanded in zip(open_model(path, 1)(x), open_model(tmp_path / 'expanded.onnx', 1)(x), strict=True):
        np.testing.assert_array_equal(packed, expanded)


@pytest.mark.thorough
def test_every_image_of_a_dynamic_batch_is_answered_alone(tmp_path):
    detector, structure = tiny_quantized('retinanet')
    settle_biases(detector, structure)
    export_onnx(detector, tmp_path / 'model.onnx', SHAPE, dynamic_batch=True)
    model = open_model(tmp_path / 'model.onnx', threads=1)
    assert model.meta['dynamic_batch']
    x = detector.data_preprocessor(tiny_batch(3), False)['inputs'].numpy()
    together, alone = model(x), [model(x[i : i + 1]) for i in range(3)]
    for place, output in enumerate(together):
        np.testing.assert_allclose(output, np.concatenate([part[place] for part in alone]), atol=1e-5)


def test_quantizers_are_restored_when_an_export_fails(tmp_path, monkeypatch):
    detector, _ = tiny_quantized('retinanet')
    before = simulated(detector, image(detector))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, 'export', interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(detector, tmp_path / 'model.onnx', SHAPE)
    assert list(tmp_path.iterdir()) == []
    for first, second in zip(before, simulated(detector, image(detector)), strict=True):
        np.testing.assert_array_equal(first, second)


class Unexportable(torch.nn.Module):
    """A neck with an operator that has no ONNX form."""

    def forward(self, feats):
        return [f + torch.linalg.svdvals(f).sum() for f in feats]


class Compiled(torch.nn.Module):
    """A neck that calls an operator of mmcv's."""

    def forward(self, feats):
        boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 0.0, 5.0, 4.0]])
        return [f + nms(boxes, f.mean() + torch.zeros(2), 0.5)[0].sum() for f in feats]


@pytest.mark.parametrize(
    ('neck', 'told'),
    [
        (Unexportable, 'line [0-9]+ of test_export.py: .'),
        (Compiled, "line [0-9]+ of mmcv/ops/nms.py: an operation that is compiled, and none of torch's own"),
    ],
)
def test_a_failed_export_says_why(tmp_path, neck, told):
    detector = tiny_detector('retinanet')
    detector.neck = torch.nn.Sequential(detector.neck, neck())
    with pytest.raises(PTQError, match=f'cannot be exported to ONNX, in neck.1, {told}'):
        export_onnx(detector, tmp_path / 'model.onnx', SHAPE)
    assert list(tmp_path.iterdir()) == []


class Counts(torch.nn.Module):
    """A neck whose code fixes the number of images."""

    def forward(self, feats):
        return [torch.stack([one * 2 for one in f]) for f in feats]


@pytest.mark.thorough
def test_a_number_of_images_that_the_detector_fixes_is_not_left_open(tmp_path):
    detector = tiny_detector('retinanet')
    detector.neck = torch.nn.Sequential(detector.neck, Counts())
    with pytest.raises(PTQError, match='--dynamic-batch'):
        export_onnx(detector, tmp_path / 'model.onnx', SHAPE, dynamic_batch=True)
    assert list(tmp_path.iterdir()) == []
    export_onnx(detector, tmp_path / 'model.onnx', SHAPE)


def test_a_size_that_the_detector_does_not_take_is_refused(tmp_path):
    with pytest.raises(PTQError, match=r'cannot take images of 33x41 .*choose another --input-shape'):
        export_onnx(tiny_detector('yolox'), tmp_path / 'model.onnx', (1, 3, 33, 41))


def test_a_forward_of_its_own_is_refused():
    class Own(SingleStageDetector):
        def _forward(self, batch_inputs, batch_data_samples=None):
            return super()._forward(batch_inputs)

    detector = tiny_detector('retinanet')
    detector.__class__ = Own
    with pytest.raises(PTQError, match='Own cannot be exported'):
        check_exportable(detector)


@pytest.mark.parametrize(
    'content,told', [(b'', 'not exported by mmdet-ptq'), (b'\x08\x09garbage', 'damaged'), (None, 'there is no model')]
)
def test_foreign_and_damaged_files(tmp_path, content, told):
    if content is not None:
        (tmp_path / 'model.onnx').write_bytes(content)
    with pytest.raises(PTQError, match=told):
        open_model(tmp_path / 'model.onnx')


def test_a_truncated_file_is_refused(exported, tmp_path):
    content = exported[2].read_bytes()
    (tmp_path / 'model.onnx').write_bytes(content[: len(content) // 2])
    with pytest.raises(PTQError, match='damaged'):
        open_model(tmp_path / 'model.onnx')


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / 'model.tflite').write_bytes(b'x')
    with pytest.raises(PTQError, match='no model of a known runtime'):
        open_model(tmp_path / 'model.tflite')


def test_layout_of_nested_outputs():
    tensors = [torch.full((), float(i)) for i in range(5)]
    nested = ([tensors[0], tensors[1]], (tensors[2], [tensors[3]]), tensors[4])
    layout = output_layout(nested)
    assert layout == [[0, 1], [2, [3]], 4]
    flat = list(tensors_in(nested))
    assert flat == tensors and nest_outputs(flat, layout) == ((flat[0], flat[1]), (flat[2], (flat[3],)), flat[4])


@pytest.mark.thorough
def test_a_deep_copy_is_not_touched():
    detector, _ = tiny_quantized('retinanet')
    other = copy.deepcopy(detector)
    x = image(detector)
    before = simulated(other, x)
    export = list(detector.ptq.activations.values())
    export[0].forward = lambda x, rounding=None: x * 0
    for first, second in zip(before, simulated(other, x), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ('kind', 'runtime'),
    [
        ('retinanet', 'onnxruntime'),
        pytest.param('faster_rcnn', 'openvino', marks=pytest.mark.thorough),
        pytest.param('yolox', 'onnxruntime', marks=pytest.mark.thorough),
    ],
)
def test_sizes_stay_open(kind, runtime, tmp_path):
    pytest.importorskip(runtime)
    detector, structure = tiny_quantized(kind, FULL)
    settle_biases(detector, structure)
    # as wide as high: the two are not taken for one
    path = get_runtime(runtime).export(detector, tmp_path, SHAPE, dynamic_size=32)
    model = open_model(path, threads=1)
    assert model.meta['size_divisor'] == 32 and model.meta['input_shape'] == list(SHAPE)
    within = integer_arithmetic if runtime == 'onnxruntime' else only_read_tensors
    for size in ((64, 64), (96, 32), (32, 160)):
        x = nn.functional.interpolate(image(detector), size)
        with torch.no_grad(), within(detector):
            expected = RawOutputs(detector)(x)
        for ours, theirs in zip(expected, model(x.numpy()), strict=True):
            least = 1e-6 if runtime == 'onnxruntime' else 2e-2
            assert np.abs(ours.numpy() - theirs).mean() <= least * ours.std()
    around = with_runtime(tiny_detector(kind, seed=5), model)
    around.data_preprocessor.pad_size_divisor = 1
    odd = dict(inputs=[tiny_batch(1)['inputs'][0][:, :48]], data_samples=tiny_batch(1)['data_samples'])
    with pytest.raises(PTQError, match='multiples of 32, .* gives 48x64; set `pad_size_divisor=32`'):
        predict(around, odd)


@pytest.mark.parametrize(
    ('kind', 'runtime', 'told'),
    [
        ('retinanet', 'ncnn', 'ncnn takes images of one size, onnxruntime and openvino any'),
        ('mask2former', 'openvino', 'Mask2Former takes all of its tensor for the image'),
    ],
)
def test_open_sizes_are_refused_where_they_are_not_known(kind, runtime, told, monkeypatch):
    architectures.register(monkeypatch)
    with pytest.raises(PTQError, match=f'{told}; give a height and a width in place of .*dynamic'):
        get_runtime(runtime).check_dynamic_size(tiny_detector(kind))


def test_a_grid_of_an_end_to_end_model_has_a_size(tmp_path):
    with pytest.raises(PTQError, match='one size; leave out --end2end or --dynamic-size'):
        export_onnx(tiny_detector('retinanet'), tmp_path / 'm.onnx', SHAPE, dynamic_size=32, end2end=True)


@pytest.mark.thorough
def test_a_size_in_the_code_of_the_detector_is_found_out(tmp_path):
    """As SOLO's: the exporter writes it into the graph, and says nothing."""
    detector = tiny_detector('retinanet')
    with torch.no_grad():
        shapes = [maps.shape for maps in detector.backbone(torch.zeros(SHAPE))]
    detector.neck.register_forward_pre_hook(
        lambda module, args: ([maps.reshape(shape) for maps, shape in zip(args[0], shapes, strict=True)],)
    )
    with pytest.raises(PTQError, match='cannot stay open: .* wrong on other sizes; give a height and a width'):
        get_runtime('onnxruntime').export(detector, tmp_path, SHAPE, dynamic_size=32)
    assert not list(tmp_path.iterdir())
