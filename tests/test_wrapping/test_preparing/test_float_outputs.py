"""A prepared detector is compared with the float one, whatever was folded."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, raw_outputs, tiny_batch, tiny_detector
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import apply_structure, prepare_detector, quantization_mode
from mmdet_ptq.wrapping.preparing import prepare as prepare_module


class _NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.fixture
def told(monkeypatch):
    lines = []
    path = 'mmdet_ptq.wrapping.preparing.float_outputs.print_log'
    monkeypatch.setattr(path, lambda text, *_, **__: lines.append(text))
    return lines


def _with_own_forward(kind, name):
    detector = tiny_detector(kind)
    norm = detector.get_submodule(name)
    norm.__class__ = _NormAct
    return detector


def _prepare(detector, **changes):
    return prepare_detector(
        detector, PTQConfig.from_dict({**OBSERVE, **changes}), lambda: predict(detector, tiny_batch(1))
    )


@pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn', 'rtmdet'])
def test_the_log_tells_how_well_they_agree(told, kind):
    _prepare(tiny_detector(kind))
    (line,) = told
    decibels = [int(word) for word in line.replace('exactly', '200').split() if word.isdecimal()]
    assert 'float outputs before and after' in line and min(decibels) > 90
    assert ('roi_head.bbox_head' if kind == 'faster_rcnn' else 'bbox_head') in line


@pytest.mark.parametrize('changes', [{}, dict(dataflow='full'), dict(activations=dict(bits=4, scale_migration=1.0))])
def test_a_norm_that_activates_keeps_its_activation(told, changes):
    name = 'backbone.layer2.0.bn2'
    detector = _with_own_forward('retinanet', name)
    before = raw_outputs(detector)
    structure = _prepare(detector, **changes)
    assert name in structure.norms and all(norm != name for _, norm in structure.folds)
    with quantization_mode(detector, 'float'):
        for old, new in zip(before, raw_outputs(detector), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn'])
def test_a_fold_that_changes_the_outputs_is_named(monkeypatch, kind):
    name = 'backbone.layer2.0.bn2'
    find_folds = prepare_module.find_folds

    def find(detector, probe):
        folds, kept = find_folds(detector, probe)
        del kept[name]
        return [*folds, ('backbone.layer2.0.conv2', name)], kept

    monkeypatch.setattr(prepare_module, 'find_folds', find)
    with pytest.raises(PTQError, match=rf'folding {name} \(_NormAct\) into backbone.layer2.0.conv2 \(Conv2d\) changed'):
        _prepare(_with_own_forward(kind, name))


def test_another_fault_names_its_layer(monkeypatch):
    def migrate(detector, *_):
        detector.bbox_head.retina_reg.bias.data += 1

    monkeypatch.setattr(prepare_module, 'migrate', migrate)
    with pytest.raises(PTQError, match='preparing the layer bbox_head.retina_reg changed the float outputs'):
        _prepare(tiny_detector('retinanet'))


def test_another_order_of_regions_is_no_fault(monkeypatch, told):
    detector = tiny_detector('faster_rcnn')
    propose = detector.rpn_head.predict

    def reordered(*args, **kwargs):
        proposals = propose(*args, **kwargs)
        return [p[torch.arange(len(p)).flip(0)] for p in proposals] if hasattr(detector, 'ptq') else proposals

    detector.rpn_head.predict = reordered
    _prepare(detector)
    assert 'rounding changed the order of regions' in told[-1]


@pytest.mark.parametrize(
    'hook', [lambda m: prune.l1_unstructured(m, 'weight', 0.5), nn.utils.weight_norm, nn.utils.spectral_norm]
)
def test_a_weight_that_a_hook_computes_stays_float_and_is_named(told, hook):
    detector = tiny_detector('retinanet')
    name = 'bbox_head.retina_cls'
    hook(detector.get_submodule(name))
    structure = _prepare(detector)
    (layer,) = (layer for layer in structure.layers if layer.name == name)
    assert not layer.integer and 'computed from others before each pass' in layer.reason
    # copied and rebuilt, as a run does
    apply_structure(other := _hooked_twin(hook, name), structure)
    other.load_state_dict(detector.state_dict())
    with quantization_mode(detector, 'float'), quantization_mode(other, 'float'):
        for old, new in zip(raw_outputs(copy.deepcopy(detector)), raw_outputs(other), strict=True):
            torch.testing.assert_close(new, old)


def _hooked_twin(hook, name):
    twin = tiny_detector('retinanet')
    hook(twin.get_submodule(name))
    return twin
