"""Detectors with two stages: several networks, with mmdet's own code between them."""

from __future__ import annotations

import copy
from types import MethodType

import architectures
import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from torch import nn

from mmdet_ptq.deploy import get_runtime, model_bytes, open_model, settle_biases, with_runtime
from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic
from mmdet_ptq.deploy.network.parts import parts_of
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.testing.models import MODELS
from mmdet_ptq.wrapping import quantized_weights
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
HEAD = 'roi_head.bbox_head'
GIVEN = dict(onnxruntime=integer_arithmetic, openvino=only_read_tensors)


@pytest.fixture(scope='module')
def detector():
    detector, structure = tiny_quantized('faster_rcnn', dict(OBSERVE, dataflow='balanced'))
    settle_biases(detector, structure)
    return detector


@pytest.fixture(scope='module')
def image(detector):
    return detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']


@pytest.fixture(scope='module', params=['onnxruntime', pytest.param('openvino', marks=pytest.mark.thorough)])
def exported(request, detector, image, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, get_runtime(request.param).export(detector, folder, tuple(image.shape))


def test_each_network_reads_what_the_detector_gives_it(detector, image):
    first, head = parts_of(detector, image)
    assert (first.name, head.name) == ('', HEAD) and first.inputs[0] is image
    seen, forward = [], detector.forward
    handle = detector.roi_head.bbox_head.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        found = RawOutputs(detector, head)(*head.inputs)
    handle.remove()
    assert torch.equal(seen[0][0], head.inputs[0]) and len(head.inputs[0]) > 1
    assert all(torch.equal(a, b) for a, b in zip(found, seen[0][1], strict=True))
    # what stands between the layers stays
    assert detector.forward is forward and not isinstance(forward, MethodType)


def test_every_network_computes_what_was_simulated_in_integers(exported, detector, image):
    runtime, path = exported
    model = open_model(path, threads=1)
    coverage = model.whole_coverage()
    assert {name.partition('#')[0] for name in coverage.integer} == set(quantized_weights(detector))
    with torch.no_grad(), GIVEN[runtime](detector):
        for part in parts_of(detector, image):
            simulated = [out.numpy() for out in RawOutputs(detector, part)(*part.inputs)]
            found = (model.parts[part.name] if part.name else model)(*(x.numpy() for x in part.inputs))
            for ours, theirs in zip(simulated, found, strict=True):
                # a code on a boundary may fall to either side
                assert np.abs(ours - theirs).mean() <= 0.01 * ours.std()


def test_mmdet_finds_the_same_boxes_around_a_runtime(exported, detector):
    runtime, path = exported
    around = with_runtime(tiny_detector('faster_rcnn', seed=5), open_model(path, threads=1))
    # random weights are chaotic: where a code on a boundary falls to the other side, other regions are proposed
    batch = tiny_batch(2 if runtime == 'onnxruntime' else 1, seed=4)
    with GIVEN[runtime](detector):
        expected = predict(detector, batch)
    for ours, theirs in zip(expected, predict(around, batch), strict=True):
        ours, theirs = ours.pred_instances, theirs.pred_instances
        assert len(ours) == len(theirs) > 0
        same = ((theirs.bboxes - ours.bboxes).abs().amax(1) <= 1e-2) & (ours.labels == theirs.labels)
        # without AVX512 OpenVINO's float operations round otherwise: a few of twenty boxes move
        chaotic = runtime == 'openvino' and torch.backends.cpu.get_cpu_capability() != 'AVX512'
        assert (~same).sum() <= (5 if chaotic else 0)


def test_what_heads_put_out_is_what_the_runtime_computes(exported, detector, image):
    """Pointwise layers of a shared head, each call with a bias of its own grid, and linear ones: the same floats."""
    runtime, path = exported
    if runtime != 'onnxruntime':
        pytest.skip('the arithmetic is that of ONNX Runtime')
    model = open_model(path, threads=1)
    for part, outputs in zip(parts_of(detector, image), (9, 2), strict=True):
        with torch.no_grad(), integer_arithmetic(detector):
            simulated = RawOutputs(detector, part)(*part.inputs)
        network = model.parts[part.name] if part.name else model
        found = network(*(tensor.numpy() for tensor in part.inputs))
        assert len(found) == len(simulated) == outputs
        for ours, theirs in zip(simulated, found, strict=True):
            np.testing.assert_array_equal(theirs, ours.numpy())


def test_no_region_is_no_box(exported):
    _, path = exported
    around = with_runtime(tiny_detector('faster_rcnn', seed=5), open_model(path, threads=1))
    around.test_cfg.rpn.min_bbox_size = 10**4
    assert all(len(sample.pred_instances) == 0 for sample in predict(around, tiny_batch(2)))


def test_files_of_one_model_stay_together(exported, tmp_path):
    _, path = exported
    files = [file for file in path.parent.iterdir() if file.suffix in (path.suffix, '.bin')]
    assert len(files) == (2 if path.suffix == '.onnx' else 4) and model_bytes(path) == sum(
        f.stat().st_size for f in files
    )
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    part = tmp_path / f'{path.stem}-{HEAD}{path.suffix}'
    part.write_bytes(path.read_bytes())
    with pytest.raises(PTQError, match=f'{HEAD}.* is of another model; keep all files together'):
        open_model(tmp_path / path.name)
    part.unlink()
    with pytest.raises(PTQError, match=f'{HEAD}.* is missing'):
        open_model(tmp_path / path.name)


def test_a_detector_of_one_stage_leaves_no_network_of_another(tmp_path, exported):
    runtime, path = exported
    for file in path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    get_runtime(runtime).export(tiny_detector('retinanet'), tmp_path, (1, 3, 64, 64))
    assert not list(tmp_path.glob('model-*')) and open_model(tmp_path / path.name).parts == {}


def test_agreement_is_told_of_all_networks(exported, detector, image, caplog):
    runtime, path = exported
    logger = MMLogger.get_instance('agreement of parts')
    said = []
    logger.info = logger.warning = said.append
    get_runtime(runtime).report_agreement(logger, detector, path, image)
    told = ' '.join(said)
    assert ' compared' in told and 'codes are the same' in told


def test_each_stage_of_a_cascade_is_a_network_and_so_is_a_mask_head(image, monkeypatch):
    architectures.register(monkeypatch)
    for kind, heads in (('cascade_rcnn', ['bbox_head.0', 'bbox_head.1']), ('mask_rcnn', ['bbox_head', 'mask_head'])):
        names = [part.name for part in parts_of(tiny_detector(kind), image)]
        assert names == ['', *(f'roi_head.{head}' for head in heads)]


@pytest.mark.thorough
def test_an_extractor_that_boxes_and_masks_share_changes_no_output(image, monkeypatch, tmp_path):
    """While a graph is traced, attributes of a detector with a module of two names are not the modules themselves."""
    architectures.register(monkeypatch)
    model = architectures.mask_rcnn()
    model['roi_head']['mask_roi_extractor'] = None
    model['roi_head']['mask_head'].update(num_convs=0)
    monkeypatch.setitem(MODELS, 'shared', lambda: model)
    detector, structure = tiny_quantized('shared', dict(OBSERVE, dataflow='balanced'))
    settle_biases(detector, structure)
    path = get_runtime('onnxruntime').export(detector, tmp_path, tuple(image.shape))
    model = open_model(path, threads=1)
    assert set(model.parts) == {HEAD, 'roi_head.mask_head'}
    for part in parts_of(detector, image):
        with torch.no_grad(), integer_arithmetic(detector):
            simulated = RawOutputs(detector, part)(*part.inputs)
        network = model.parts[part.name] if part.name else model
        found = network(*(tensor.numpy() for tensor in part.inputs))
        assert [out.shape for out in found] == [tuple(out.shape) for out in simulated]


@pytest.mark.thorough
def test_masks_without_boxes_are_found_around_a_runtime(tmp_path, monkeypatch):
    architectures.register(monkeypatch)
    # with min-max weights two scores are so near that their order is chance
    detector, structure = tiny_quantized('solo', dict(OBSERVE, weights={}, dataflow='balanced'))
    settle_biases(detector, structure)
    model = open_model(get_runtime('onnxruntime').export(detector, tmp_path, (1, 3, 64, 64)), threads=1)
    integer = {name.partition('#')[0] for name in model.coverage().integer}
    assert {'mask_head.conv_cls', 'mask_head.conv_mask_list.0'} <= integer
    batch = tiny_batch(1, seed=4)
    with integer_arithmetic(detector):
        (expected,) = predict(detector, batch)
    (found,) = predict(with_runtime(tiny_detector('solo', seed=5), model), batch)
    ours, theirs = expected.pred_instances, found.pred_instances
    assert len(ours) == len(theirs) > 0 and torch.equal(ours.labels, theirs.labels)
    assert (ours.masks == theirs.masks).float().mean() > 0.99


def test_a_runtime_that_takes_one_network_refuses_two_stages():
    told = 'FasterRCNN has two stages, and ncnn takes .* onnxruntime or openvino or tensorrt'
    with pytest.raises(PTQError, match=told):
        get_runtime('ncnn').check_detector(tiny_detector('faster_rcnn'))


def test_weights_outside_of_the_networks_are_named(image):
    detector = tiny_detector('faster_rcnn')
    detector.roi_head.scales = nn.Embedding(2, 3)
    with pytest.raises(PTQError, match=r'its own code computes with roi_head\.scales\.weight'):
        parts_of(detector, image)


@pytest.mark.thorough
@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_each_call_of_a_head_is_a_network_with_ranges_of_its_own(image, monkeypatch, tmp_path, runtime):
    pytest.importorskip(runtime)
    kind = type(tiny_detector('faster_rcnn').roi_head)
    call = kind._bbox_forward

    def twice(self, features, rois):
        first = call(self, features, rois)['cls_score']
        again = call(self, tuple(level * 3 + 1 for level in features), rois)
        return dict(again, cls_score=again['cls_score'] + first)

    monkeypatch.setattr(kind, '_bbox_forward', twice)
    detector, structure = tiny_quantized('faster_rcnn', dict(OBSERVE, dataflow='balanced'))
    settle_biases(detector, structure)
    assert [part.name for part in parts_of(detector, image)] == ['', HEAD, f'{HEAD}#1']
    path = get_runtime(runtime).export(detector, tmp_path, tuple(image.shape))
    model = open_model(path, threads=1)
    with torch.no_grad(), GIVEN[runtime](detector):
        for part in parts_of(detector, image)[1:]:
            simulated = [out.numpy() for out in RawOutputs(detector, part)(*part.inputs)]
            for ours, theirs in zip(simulated, model.parts[part.name](*(x.numpy() for x in part.inputs)), strict=True):
                assert np.abs(ours - theirs).mean() <= 0.01 * ours.std()
        expected = predict(detector, tiny_batch(1, seed=4))
    said = []
    logger = MMLogger.get_instance(f'calls in {runtime}')
    logger.info = logger.warning = said.append
    get_runtime(runtime).report_agreement(logger, detector, path, image)
    assert 'every tensor has at least' in said[-1] or 'the first that diverges' in said[-1]
    around = with_runtime(tiny_detector('faster_rcnn', seed=5), model)
    for ours, theirs in zip(expected, predict(around, tiny_batch(1, seed=4)), strict=True):
        ours, theirs = ours.pred_instances, theirs.pred_instances
        assert len(ours) == len(theirs) > 0 and torch.equal(ours.labels, theirs.labels)
        torch.testing.assert_close(theirs.scores, ours.scores, atol=1e-2, rtol=0)


def test_a_head_that_reads_more_than_tensors_is_refused(image, monkeypatch):
    detector = tiny_detector('faster_rcnn')
    forward = type(detector.roi_head.bbox_head).forward
    monkeypatch.setattr(type(detector.roi_head.bbox_head), 'forward', lambda self, x, *others: forward(self, x))
    call = detector.roi_head.bbox_head.__call__
    detector.roi_head._bbox_forward = lambda x, rois: dict(
        zip(
            ('cls_score', 'bbox_pred'),
            call(detector.roi_head.bbox_roi_extractor(x, rois), True, InstanceData()),
            strict=True,
        )
    )
    with pytest.raises(PTQError, match=r'roi_head\.bbox_head reads InstanceData in a forward pass'):
        parts_of(detector, image)


def test_a_head_is_called_as_it_was_exported(exported, detector, image):
    _, path = exported
    around = with_runtime(copy.deepcopy(tiny_detector('faster_rcnn')), open_model(path, threads=1))
    with pytest.raises(PTQError, match='is called with'):
        around.roi_head.bbox_head(parts_of(detector, image)[1].inputs[0], True)
