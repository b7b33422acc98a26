"""mmdet's own code around a runtime: here one that computes each network with PyTorch, so that nothing may differ."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import nn

from mmdet_ptq.deploy.network.parts import FIRST, parts_of
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs, first_outputs, output_layout, output_shapes
from mmdet_ptq.deploy.network.runtime_detector import runtime_detector, with_runtime
from mmdet_ptq.deploy.runtime import Runtime
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector, tiny_model_cfg

SHAPE = (2, 3, 64, 64)


class Computed(Runtime):
    """One network of a detector, computed by itself."""

    name = 'torch'

    def __init__(self, detector, part=FIRST, **meta):
        self.detector, self.part, self.meta, self.shapes = detector, part, meta, []

    def __call__(self, *inputs):
        assert all(given.dtype == np.float32 and given.flags.c_contiguous for given in inputs)
        self.shapes.append([given.shape for given in inputs])
        with torch.no_grad():
            return [out.numpy() for out in RawOutputs(self.detector, self.part)(*map(torch.from_numpy, inputs))]


def computed(detector, shape=SHAPE, dynamic_batch=False, **more):
    """A detector as a runtime; what it says of itself is what exports say."""
    outputs = first_outputs(detector, shape)
    told = dict(outputs=output_layout(outputs), raw_shapes=output_shapes(outputs), input_shape=list(shape))
    first, *others = parts_of(detector, torch.zeros(1, *shape[1:]))
    model, parts = Computed(detector, first, **told, dynamic_batch=dynamic_batch, **more), {}
    for part in others:
        example = part.run(detector, *part.inputs)
        parts[part.name] = Computed(
            detector,
            part,
            dynamic_batch=part.any_number,
            outputs=output_layout(example),
            raw_shapes=output_shapes(example),
            inputs=[list(tensor.shape) for tensor in part.inputs],
            constants=part.constants,
        )
    if parts:
        model.meta['parts'] = dict.fromkeys(parts, 'digest')
        model.parts = parts
    return model


KINDS = [
    'retinanet',
    'yolox',
    'solo',
    'yolact',
    'condinst',
    'faster_rcnn',
    'mask_rcnn',
    'cascade_rcnn',
    'groie',
    'query_inst',
    'deformable_detr',
    'mask2former',
]


@pytest.mark.parametrize('kind', KINDS)
def test_mmdet_finds_exactly_the_same_around_the_same_network(kind, monkeypatch):
    architectures.register(monkeypatch)
    detector, batch = tiny_detector(kind), tiny_batch(2, seed=4)
    one = kind in ('faster_rcnn', 'mask_rcnn', 'cascade_rcnn', 'groie', 'query_inst')
    with torch.no_grad():
        expected = predict(detector, batch)
        model = computed(detector, (1, *SHAPE[1:]) if one else SHAPE)
        around = with_runtime(tiny_detector(kind, seed=5), model)
        found = predict(around, batch)
        # of another batch nothing is left
        again = predict(around, batch)
    for ours, theirs, repeated in zip(expected, found, again, strict=True):
        ours, theirs, repeated = (sample.pred_instances for sample in (ours, theirs, repeated))
        assert len(ours) == len(theirs) > 0
        torch.testing.assert_close(theirs.scores, ours.scores, rtol=1e-4, atol=1e-5)
        assert theirs.labels.equal(ours.labels) and repeated.scores.equal(theirs.scores)
        torch.testing.assert_close(theirs.bboxes, ours.bboxes, rtol=1e-3, atol=1e-2)
        if 'masks' in ours:
            assert (ours.masks == theirs.masks).float().mean() > 0.999
    assert not list(around.backbone.parameters())


@pytest.mark.parametrize(
    'exported, open_batch, images, seen',
    [
        (2, False, 3, [2, 2]),  # split, and the last one filled up
        (2, False, 1, [2]),
        (1, False, 3, [1, 1, 1]),
        (2, True, 3, [3]),
    ],
)
def test_batches_are_split_and_filled_up(exported, open_batch, images, seen):
    detector, batch = tiny_detector('retinanet'), tiny_batch(images, seed=4)
    model = computed(detector, (exported, *SHAPE[1:]), open_batch)
    found = predict(with_runtime(tiny_detector('retinanet', seed=5), model), batch)
    assert model.shapes == [[(count, *SHAPE[1:])] for count in seen]
    # what fills up comes to nobody
    maps = with_runtime(tiny_detector('retinanet', seed=5), model).bbox_head(torch.zeros(images, *SHAPE[1:]))
    assert {len(level) for levels in maps for level in levels} == {images}
    for ours, theirs in zip(predict(detector, batch), found, strict=True):
        torch.testing.assert_close(theirs.pred_instances.scores, ours.pred_instances.scores, rtol=1e-4, atol=1e-5)


def test_images_of_another_size_are_padded_or_refused():
    model = computed(tiny_detector('retinanet'), (1, 3, 64, 96))
    around = with_runtime(tiny_detector('retinanet', seed=5), model)
    predict(around, architectures.sized_batch(40, 64))
    assert model.shapes == [[(1, 3, 64, 96)]] * 2
    with pytest.raises(PTQError, match=r'images of 64x96 \(height x width\).* gives 128x96; .*--input-shape 128 96'):
        predict(around, architectures.sized_batch(97, 20))


def test_models_of_open_size_take_multiples_of_their_divisor():
    detector = tiny_detector('retinanet')
    model = computed(detector, (1, 3, 64, 64), size_divisor=32)
    around = with_runtime(tiny_detector('retinanet', seed=5), model)
    batch = architectures.sized_batch(33, 96, num_images=1)
    (found,), (expected,) = predict(around, batch), predict(detector, batch)
    assert model.shapes == [[(1, 3, 64, 96)]]
    torch.testing.assert_close(found.pred_instances.bboxes, expected.pred_instances.bboxes, rtol=1e-3, atol=1e-2)
    around.data_preprocessor.pad_size_divisor = 1
    with pytest.raises(PTQError, match=r'multiples of 32, the test pipeline gives 33x96; set `pad_size_divisor=32`'):
        predict(around, batch)


def test_each_call_of_a_head_has_a_network_of_its_own_in_every_pass(monkeypatch):
    detector = tiny_detector('faster_rcnn')
    kind = type(detector.roi_head)
    call = kind._bbox_forward

    def twice(self, features, rois):
        first = call(self, features, rois)
        return dict(call(self, tuple(level * 3 for level in features), rois), cls_score=first['cls_score'])

    monkeypatch.setattr(kind, '_bbox_forward', twice)
    model = computed(detector, (1, *SHAPE[1:]))
    around = with_runtime(tiny_detector('faster_rcnn', seed=5), model)
    with torch.no_grad():
        for seed in (4, 5):
            batch = tiny_batch(1, seed=seed)
            (ours,), (theirs,) = predict(detector, batch), predict(around, batch)
            torch.testing.assert_close(theirs.pred_instances.scores, ours.pred_instances.scores, rtol=1e-4, atol=1e-5)
    assert {name: len(part.shapes) for name, part in model.parts.items()} == {
        'roi_head.bbox_head': 2,
        'roi_head.bbox_head#1': 2,
    }


def test_no_region_needs_no_runtime():
    model = computed(tiny_detector('faster_rcnn'), (1, *SHAPE[1:]))
    around = with_runtime(tiny_detector('faster_rcnn', seed=5), model)
    scores, deltas = around.roi_head.bbox_head(torch.zeros(0, 16, 7, 7))
    assert scores.shape == (0, 4) and deltas.shape == (0, 12)
    assert not model.parts['roi_head.bbox_head'].shapes


class Answers(Runtime):
    """An end-to-end model that finds three boxes in each image, and has a place for a fourth."""

    name = 'answers'
    BOXES = [[1, 2, 30, 70], [0, 0, 10, 12], [5, 5, 8, 9], [0, 0, 0, 0]]

    def __init__(self, **meta):
        outputs = dict(end2end=True, outputs=[0, 1, 2], input_shape=[1, 3, 64, 64], dynamic_batch=False)
        self.meta, self.given = {**outputs, **meta}, []

    def __call__(self, image, *sizes):
        self.given += [size.tolist() for size in sizes]
        labels = np.array([[2, 0, 1, -1]])
        return [np.float32([self.BOXES]), np.float32([[0.9, 0.8, 0.7, 0.0]]), labels]


@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('kind', ['retinanet', 'yolox'])
def test_detections_of_the_model_are_mmdets_instances(kind, rescale):
    model = Answers(inputs=[[1, 3, 64, 64], [1, 2]])
    around, sizes = with_runtime(tiny_detector(kind), model), [(48, 50), (40, 20)]
    meta = dict(ori_shape=(24, 100), scale_factor=(0.5, 2.0))
    samples = [DetDataSample(metainfo=dict(meta, img_shape=size)) for size in sizes]
    found = around.bbox_head.predict(torch.zeros(2, 3, 64, 64), samples, rescale=rescale)
    assert model.given == [[[48, 50]], [[40, 20]]]
    for instances, (height, width) in zip(found, sizes, strict=True):
        boxes = np.float32(Answers.BOXES[:3])
        if kind == 'retinanet':  # YOLOX does not end boxes at the image
            boxes[:, 2:] = np.minimum(boxes[:, 2:], [width, height])
        np.testing.assert_allclose(instances.bboxes, boxes / (np.float32([0.5, 2.0] * 2) if rescale else 1))
        assert instances.labels.tolist() == [2, 0, 1]
        assert instances.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_models_of_older_versions_are_given_no_size():
    model = Answers()
    around = with_runtime(tiny_detector('retinanet'), model)
    (found,) = predict(around, tiny_batch(1))
    assert not model.given and found.pred_instances.labels.tolist() == [2, 0, 1]


def test_names_of_classes_are_the_models_where_nothing_else_is_said():
    config = Config(dict(model=tiny_model_cfg('retinanet')))
    for told, given, expected in (
        ({}, None, {}),
        (dict(input=dict(classes=['a', 'b', 'c'])), None, dict(classes=('a', 'b', 'c'))),
        (dict(input=dict(classes=['a', 'b', 'c'])), dict(classes=('x',)), dict(classes=('x',))),
    ):
        around = runtime_detector(config, computed(tiny_detector('retinanet'), **told), given)
        assert around.dataset_meta == expected and around.cfg is config and not around.training
        assert not any(module.training for module in around.modules())


def config_of(kind, **head):
    model = tiny_model_cfg(kind)
    model.get('bbox_head', {}).update(head)
    return Config(dict(model=model))


def test_models_of_other_detectors_are_refused():
    model = computed(tiny_detector('retinanet'))
    places = len(model.meta['raw_shapes'])
    told = rf'of its {places} raw outputs number 1 has the shape \[9, 8, 8\], the config.s {places} have \[21, 8, 8\] '
    with pytest.raises(PTQError, match=told):
        runtime_detector(config_of('retinanet', num_classes=7), model)
    # one output more or less
    model.meta['raw_shapes'].pop()
    with pytest.raises(PTQError, match=rf'number {places} has the shape None, the config.s {places} have \[.*give the'):
        runtime_detector(config_of('retinanet'), model)
    with pytest.raises(PTQError, match=r'it has the networks of one stage, the config.s roi_head\.bbox_head; give the'):
        runtime_detector(config_of('faster_rcnn'), model)
    # files of older versions do not tell
    del model.meta['raw_shapes']
    runtime_detector(config_of('retinanet', num_classes=7), model)


def test_networks_of_regions_are_those_of_the_config():
    model = computed(tiny_detector('faster_rcnn'), (1, *SHAPE[1:]))
    runtime_detector(config_of('faster_rcnn'), model)
    model.meta['parts'] = {'roi_head.bbox_head.0': '', 'roi_head.bbox_head.1': ''}
    told = r'has the networks roi_head\.bbox_head\.0, roi_head\.bbox_head\.1, the config.s roi_head\.bbox_head; give'
    with pytest.raises(PTQError, match=told):
        runtime_detector(config_of('faster_rcnn'), model)


def test_detectors_without_such_a_network_take_no_runtime():
    with pytest.raises(PTQError, match='^Identity cannot be exported'):
        with_runtime(nn.Identity(), Answers())
