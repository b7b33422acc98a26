"""Detectors of prototypes: which they are, what their network gives, and that their forward is theirs again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from mask_architectures import condinst, solo, yolact
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import dispatch
from mmdet_ptq.predictions.prototypes import (
    align_prototypes,
    answering_with_prototypes,
    has_prototypes,
    prototype_heads,
    prototype_network,
)
from mmdet_ptq.testing import SIZE, tiny_detector
from mmdet_ptq.testing.models import MODELS

IMAGE = (SIZE, SIZE)
KINDS = dict(yolact=yolact, condinst=condinst, solo=solo)


@pytest.fixture
def build(monkeypatch) -> Callable[[str], nn.Module]:
    def make(kind: str) -> nn.Module:
        if kind in KINDS:
            monkeypatch.setitem(MODELS, kind, KINDS[kind])
        return tiny_detector(kind)

    return make


def own(module: nn.Module, **methods) -> None:
    """Gives a module a class of its own, with other methods."""
    module.__class__ = type(f'Own{type(module).__name__}', (type(module),), methods)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(dispatch, 'print_log', lambda text, **_: lines.append(text))
    dispatch.announce.cache_clear()
    return lines


@pytest.mark.parametrize(
    'kind, expected',
    [('yolact', True), ('condinst', True), ('solo', False), ('retinanet', False), ('faster_rcnn', False)],
)
def test_who_has_prototypes(build, kind, expected):
    assert has_prototypes(build(kind)) == expected


@pytest.mark.parametrize('kind', ['yolact', 'condinst'])
def test_a_forward_of_ones_own_is_another_detector(build, kind):
    detector = build(kind)
    own(detector.mask_head, loss=None)
    own(detector, loss=None)
    assert has_prototypes(detector)
    own(detector.mask_head, forward=lambda self, *args: None)
    assert not has_prototypes(detector)
    detector = build(kind)
    own(detector, _forward=lambda self, *args: None)
    assert not has_prototypes(detector)


@pytest.mark.parametrize('kind, levels', [('yolact', 3), ('condinst', 2)])
def test_the_network_gives_what_the_two_heads_do(build, kind, levels):
    detector, images = build(kind), torch.randn(2, 3, *IMAGE)
    boxes, prototypes = prototype_heads(detector)
    assert boxes is detector.bbox_head
    if kind == 'yolact':
        assert prototypes is detector.mask_head.protonet
    else:
        assert prototypes is detector.mask_head.mask_feature_head
    with torch.no_grad():
        found, drawn = prototype_network(detector)(images)
        features = detector.extract_feat(images)
        expected = detector.bbox_head(features)
        again = prototypes(features[0] if kind == 'yolact' else features)
    assert torch.equal(drawn, again) and drawn.shape[:2] == (2, 8)
    assert [len(maps) for maps in found] == [levels] * len(expected)
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_raw_outputs_are_the_networks_while_it_lasts(build):
    detector, images = build('yolact'), torch.randn(1, 3, *IMAGE)
    with torch.no_grad():
        with answering_with_prototypes(detector):
            _, drawn = detector(images, None, mode='tensor')
        assert torch.equal(drawn, prototype_network(detector)(images)[1])
    assert '_forward' not in vars(detector)
    with pytest.raises(KeyboardInterrupt), answering_with_prototypes(detector):
        raise KeyboardInterrupt
    assert '_forward' not in vars(detector)


def test_other_detectors_answer_as_ever(build):
    detector, images = build('retinanet'), torch.randn(1, 3, *IMAGE)
    with torch.no_grad(), answering_with_prototypes(detector):
        assert '_forward' not in vars(detector)
        scores, _ = detector(images, None, mode='tensor')
        assert torch.equal(scores[0], detector.bbox_head(detector.extract_feat(images))[0][0])


@torch.no_grad()
def test_a_mask_of_yolact_is_a_sum_of_prototypes(build):
    detector, images = build('yolact'), torch.randn(2, 3, *IMAGE)
    outputs = prototype_network(detector)(images)
    aligned = align_prototypes(detector, outputs)
    (*_, coefficients), prototypes = outputs
    rows = np.concatenate([m.permute(0, 2, 3, 1).reshape(2, -1, 8).numpy() for m in coefficients], 1)
    assert rows.shape[1] == aligned.boxes.shape[1] == sum(aligned.level_sizes)
    asked = torch.tensor([[0, 0], [0, 57], [1, 3]])
    expected = [np.tensordot(rows[image, prior], prototypes[image].numpy(), 1) for image, prior in asked.tolist()]
    np.testing.assert_allclose(aligned.masks.draw(asked), np.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind, base', [('yolact', 'YOLACTHead'), ('condinst', 'CondInstBboxHead')])
def test_a_head_that_decodes_otherwise_goes_to_the_fallback(build, said, kind, base):
    detector = build(kind)
    own(detector.bbox_head, predict_by_feat=lambda self, *args, **kwargs: None)
    with torch.no_grad():
        outputs = prototype_network(detector)(torch.randn(1, 3, *IMAGE))
    aligned = align_prototypes(detector, outputs)
    boxes, drawn = outputs
    assert aligned.cls_logits is None and aligned.raw[-1] is drawn
    assert len(aligned.raw) == sum(map(len, boxes)) + 1
    assert len(said) == 1 and f'Own{base} decodes in another way than {base}' in said[0]


def test_training_mode_is_refused(build):
    detector = build('condinst')
    with torch.no_grad():
        outputs = prototype_network(detector)(torch.randn(1, 3, *IMAGE))
    detector.bbox_head.train()
    with pytest.raises(PTQError, match='CondInstBboxHead returns other outputs in training mode'):
        align_prototypes(detector, outputs)
