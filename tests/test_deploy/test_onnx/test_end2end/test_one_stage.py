"""Exported decoding and NMS against mmdet's own, on real heads behind a backbone of three convolutions."""

import copy

import numpy as np
import onnx
import pytest
import torch
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from tiny_heads import one_stage_heads
from torch import nn

from mmdet_ptq import cli
from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import export_onnx, get_runtime, open_model, with_runtime
from mmdet_ptq.deploy.onnx.end2end import check_end2end
from mmdet_ptq.deploy.onnx.end2end.one_stage import OneStage
from mmdet_ptq.deploy.onnx.end2end.suppression import MAX_DETECTIONS, Suppression
from mmdet_ptq.deploy.onnx.export import model_meta
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import SIZE, predict, tiny_batch, tiny_model_cfg
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import prepare_detector

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")

# 192 priors on the first level, 48 on the second, 12 on the third of the anchor heads: the limit of 100 for each level
# chooses among priors, among pairs of prior and class, and not at all
TEST = dict(nms_pre=100, min_bbox_size=0, score_thr=0.3, nms=dict(type='nms', iou_threshold=0.5), max_per_img=40)
DELTA = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
HEADS = dict(one_stage_heads(16, DELTA), retinanet=tiny_model_cfg('retinanet')['bbox_head'])
CONFIGS = dict(
    # more places than candidates; boxes of some size only
    retinanet=dict(TEST, max_per_img=300, min_bbox_size=12),
    gfl=dict(TEST, nms=dict(type='nms', iou_threshold=0.5, class_agnostic=True)),
)


class Pyramid(nn.Module):
    """Three levels."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, 16, 2, 2), nn.Conv2d(16, 16, 2, 2)])

    def forward(self, x):
        levels = []
        for conv in self.convs:
            x = conv(x).relu()
            levels.append(x)
        return tuple(levels)


def build(kind, **test_cfg):
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    preprocessor = dict(tiny_model_cfg('retinanet')['data_preprocessor'])
    detector = MODELS.build(
        ConfigDict(
            type='SingleStageDetector',
            data_preprocessor=preprocessor,
            backbone=dict(type=Pyramid),
            bbox_head=dict(HEADS[kind]),
            train_cfg=None,
            test_cfg=dict(CONFIGS.get(kind, TEST), **test_cfg),
        )
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in detector.parameters():
        if parameter.dim() == 4:
            fan = parameter[0].numel()
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5)
    return detector.eval()


def expected(detector, batch):
    with torch.no_grad():
        return [sample.pred_instances for sample in predict(detector, batch)]


def images(detector, batch):
    return detector.data_preprocessor(copy.deepcopy(batch), False)['inputs'].numpy()


def check(outputs, instances, count):
    boxes, scores, labels = outputs
    assert boxes.shape == (len(instances), count, 4)
    assert scores.shape == labels.shape == (len(instances), count)
    assert labels.dtype == np.int64
    for ours, score, label, theirs in zip(boxes, scores, labels, instances, strict=True):
        found = min(len(theirs), count)
        assert found > 5
        assert len(set(label[:found])) > 1
        np.testing.assert_array_equal(label[:found], theirs.labels[:found])
        np.testing.assert_allclose(score[:found], theirs.scores[:found], atol=1e-4)
        np.testing.assert_allclose(ours[:found], theirs.bboxes[:found], rtol=1e-3, atol=0.02)
        assert (label[found:] == -1).all()
        assert not ours[found:].any()
        assert not score[found:].any()


QUICK = ('ssd', 'yolox')


@pytest.fixture(
    scope='module', params=[head if head in QUICK else pytest.param(head, marks=pytest.mark.slow) for head in HEADS]
)
def exported(request, tmp_path_factory):
    detector = build(request.param)
    path = tmp_path_factory.mktemp(request.param) / 'model.onnx'
    export_onnx(detector, path, (1, 3, SIZE, SIZE), dynamic_batch=request.param == 'atss', end2end=True)
    return request.param, detector, path


def test_detections_are_mmdets(exported):
    kind, detector, path = exported
    count = CONFIGS.get(kind, TEST)['max_per_img']
    model = open_model(path, threads=1)
    check(model(images(detector, tiny_batch(1))), expected(detector, tiny_batch(1)), count)
    # an image that does not fill its tensor: its boxes end where it ends, and are suppressed as they are then
    batch, size = tiny_batch(1, seed=1), (48, 40)
    batch['data_samples'][0].set_metainfo(dict(img_shape=size, ori_shape=size))
    check(model(images(detector, batch), np.float32([size])), expected(detector, batch), count)
    if kind == 'atss':
        batch = tiny_batch(3, seed=5)
        check(model(images(detector, batch)), expected(detector, batch), count)


def test_graph_is_standard_onnx(exported):
    _, _, path = exported
    graph = onnx.load(path).graph
    assert [output.name for output in graph.output] == [*OneStage.names]
    assert {node.domain for node in graph.node} == {''}
    assert sum(node.op_type == 'NonMaxSuppression' for node in graph.node) == 1
    # priors are constants: nothing is counted when the model runs
    assert not {'Range', 'Loop', 'NonZero'} & {node.op_type for node in graph.node}


def test_file_says_what_it_holds(exported):
    kind, _, path = exported
    meta = model_meta(path)
    assert meta['end2end'] is True
    assert meta['outputs'] == [0, 1, 2]
    # the decoding adds no layer
    assert all(layer.startswith(('backbone.', 'bbox_head.')) for layer in meta['layers'])
    assert not any('integral' in layer for layer in meta['layers']), kind


def test_runtime_detector_answers_like_the_simulation(tmp_path):
    detector = build('rtmdet')
    structure = prepare_detector(detector, PTQConfig.from_dict(OBSERVE), lambda: predict(detector, tiny_batch(1)))
    observe_activations(detector, [tiny_batch(2, seed=1)], structure)
    batch = tiny_batch(3, seed=4)
    for sample in batch['data_samples']:
        # scaled and padded by the pipeline
        sample.set_metainfo(dict(img_shape=(60, SIZE), ori_shape=(120, 32), scale_factor=(2.0, 0.5)))
    path = get_runtime('onnxruntime').export(detector, tmp_path, (2, 3, SIZE, SIZE), end2end=True)
    answering = with_runtime(copy.deepcopy(detector), open_model(path, threads=1))
    for ours, theirs in zip(expected(answering, batch), expected(detector, batch), strict=True):
        assert isinstance(ours, InstanceData)
        assert ours.bboxes[:, 0::2].max() <= 32
        assert ours.bboxes[:, 1::2].max() <= 120
        assert (ours.labels >= 0).all()
        assert (ours.scores[:-1] >= ours.scores[1:]).all()
        # both round the same codes but for a few, so all but a few detections are the same
        gap = (ours.bboxes[:, None] - theirs.bboxes).abs().amax(-1)
        gap[ours.labels[:, None] != theirs.labels] = float('inf')
        assert (gap.amin(1) < 0.5).float().mean() >= 0.8


@pytest.mark.thorough
@pytest.mark.parametrize('kind', ['ssd', pytest.param('yolox', marks=pytest.mark.slow)])
def test_openvino_detects_the_same(tmp_path, kind):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    detector = build(kind)
    path = get_runtime('openvino').export(detector, tmp_path, (2, 3, SIZE, SIZE), end2end=True)
    batch, model = tiny_batch(2, seed=3), open_model(path, threads=1)
    check(model(images(detector, batch)), expected(detector, batch), TEST['max_per_img'])
    outputs = model(images(detector, batch), np.float32([[SIZE, SIZE]] * 2))
    check(outputs, expected(detector, batch), TEST['max_per_img'])


def test_heads_without_a_limit_get_one():
    assert Suppression(ConfigDict(score_thr=0.01, nms=dict(iou_threshold=0.65))).count == MAX_DETECTIONS


def replaced_method(name):
    detector = build('retinanet')
    head = detector.bbox_head
    head.__class__ = type('MyHead', (type(head),), {name: lambda self, *args, **kwargs: None})
    return detector


@pytest.mark.parametrize('name', ['predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'])
def test_redefined_decoding_is_refused_by_the_name_of_the_head(name):
    with pytest.raises(PTQError, match='MyHead'):
        check_end2end(replaced_method(name))


def test_foreign_box_coder_is_refused():
    detector = build('retinanet')
    coder = detector.bbox_head.bbox_coder
    coder.__class__ = type('MyCoder', (DeltaXYWHBBoxCoder,), {})
    with pytest.raises(PTQError, match='RetinaHead.*MyCoder'):
        check_end2end(detector)


def test_custom_scores_are_refused():
    detector = build('retinanet')
    detector.bbox_head.loss_cls.custom_cls_channels = True
    with pytest.raises(PTQError, match='RetinaHead'):
        check_end2end(detector)


def test_redefined_prediction_of_the_detector_is_refused():
    detector = build('retinanet')
    detector.__class__ = type('MyDetector', (SingleStageDetector,), dict(predict=lambda self, *args: None))
    with pytest.raises(PTQError, match='MyDetector'):
        check_end2end(detector)


@pytest.mark.parametrize(
    'test_cfg',
    [
        dict(nms=dict(type='soft_nms', iou_threshold=0.5)),
        dict(nms=dict(type='nms', iou_threshold=0.5, max_num=5)),
        dict(nms=None),
    ],
    ids=['soft', 'max_num', 'none'],
)
def test_other_suppression_is_refused_before_anything_is_exported(test_cfg, tmp_path):
    with pytest.raises(PTQError, match='RetinaHead'):
        export_onnx(build('retinanet', **test_cfg), tmp_path / 'model.onnx', (1, 3, SIZE, SIZE), end2end=True)
    assert not list(tmp_path.iterdir())


def test_command_line_refuses_runtimes_without_nms(monkeypatch, capsys):
    monkeypatch.setattr(get_runtime('onnxruntime'), 'end2end', False)
    with pytest.raises(SystemExit):
        cli.export(['quantized.pth', '--to', 'openvino', 'onnxruntime', '--end2end'])
    assert 'for openvino, not for onnxruntime' in capsys.readouterr().err
