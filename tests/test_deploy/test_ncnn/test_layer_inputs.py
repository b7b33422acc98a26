import copy

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger

from mmdet_ptq.deploy import get_runtime
from mmdet_ptq.deploy.agreement import compare_layer_inputs
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import SIZE, models, tiny_model_cfg, tiny_quantized
from mmdet_ptq.wrapping.flow import without_dataflow

pytest.importorskip('ncnn', reason="needs ncnn: pip install 'mmdet-ptq[ncnn]'")
pytest.importorskip('pnnx', reason="needs pnnx: pip install 'mmdet-ptq[ncnn]'")

from mmdet_ptq.deploy.ncnn.layer_inputs import ncnn_inputs

MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'), quantizer=dict(symmetric=True, narrow_range=True))
SHAPE = (1, 3, SIZE, SIZE)


def exported(folder, kind, **ptq):
    detector, structure = tiny_quantized(kind, dict(preset='w8a8_observe', activations=MIN_MAX, **ptq))
    return detector, structure, get_runtime('ncnn').export(detector, folder, SHAPE)


@pytest.fixture(scope='module')
def retinanet(tmp_path_factory):
    return exported(tmp_path_factory.mktemp('retinanet'), 'retinanet')


def image(seed=2):  # of 0 and 1 a code lies on a boundary, where float32's rounding decides
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def compare(detector, path, **kwargs):
    return compare_layer_inputs(detector, ncnn_inputs(path, image()), image(), **kwargs)


def test_every_layer_of_every_level_reads_the_codes_of_the_simulation(retinanet):
    detector, structure, path = retinanet
    found = compare(detector, path, follow=True)
    assert [entry.name for entry in found if '#' in entry.name]  # heads that levels share
    assert len(found) == len({entry.name for entry in found}) == sum(len(layer.inputs) for layer in structure.layers)
    assert min(entry.identical for entry in found) > 0.999 and max(entry.largest for entry in found) <= 1


def test_the_layer_behind_a_wrong_bias_is_the_first_to_diverge(retinanet):
    detector, _, path = retinanet
    wrong = copy.deepcopy(detector)
    names = [entry.name for entry in compare(detector, path)]
    with torch.no_grad():
        wrong.get_submodule(names[1]).bias += 1
    diverging = [entry.name for entry in compare(wrong, path, follow=True) if entry.identical < 0.999]
    assert diverging and diverging[0] == names[2]


@pytest.mark.thorough
@pytest.mark.parametrize('kind', ['retinanet', 'yolox'])
def test_quantizers_between_the_layers_are_left_out(tmp_path, kind):
    detector, structure, path = exported(tmp_path, kind, dataflow='full')
    found = compare(detector, path, follow=True, within=without_dataflow)
    assert len(found) == sum(len(layer.inputs) for layer in structure.layers)
    assert min(entry.identical for entry in found) > 0.999
    # the simulation has them
    assert min(entry.identical for entry in compare(detector, path, follow=True)) < 0.999


def test_layers_that_feed_no_output_are_left_out(tmp_path, monkeypatch):
    model = tiny_model_cfg('retinanet')
    fourth = dict(num_stages=4, strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1))
    monkeypatch.setitem(models.MODELS, 'deep', lambda: {**model, 'backbone': {**model['backbone'], **fourth}})
    detector, structure, path = exported(tmp_path, 'deep')
    dead = sum(len(layer.inputs) for layer in structure.layers if layer.name.startswith('backbone.layer4'))
    found = compare(detector, path, follow=True)
    assert dead and len(found) == sum(len(layer.inputs) for layer in structure.layers) - dead
    assert min(entry.identical for entry in found) > 0.999


def test_the_comparison_is_told(retinanet):
    detector, structure, path = retinanet

    class Log:
        lines = []
        info = warning = lines.append

    get_runtime('ncnn').report_agreement(Log, detector, path, image())
    count = sum(len(layer.inputs) for layer in structure.layers)
    assert f'{count} inputs of layers compared with ncnn' in Log.lines[0]
    assert Log.lines[-1] == 'every tensor has at least 99.9% of its codes in common'


def test_inputs_that_ncnn_reads_in_float_are_named(tmp_path):
    name = 'bbox_head.retina_cls'
    detector, structure, path = exported(tmp_path, 'retinanet', overrides={name: dict(activations=dict(bits=16))})
    inputs = ncnn_inputs(path, image())
    layer = next(layer for layer in structure.layers if layer.name == name)
    in_float = {f'{name}#{call}' if call else name for call in range(len(layer.inputs))}
    assert {call for call, value in inputs.items() if value is None} == in_float
    found = compare_layer_inputs(detector, inputs, image())
    assert {entry.name for entry in found} == inputs.keys() - in_float

    class Log:
        lines = []
        info = warning = lines.append

    get_runtime('ncnn').report_agreement(Log, detector, path, image())
    assert f'ncnn reads the input of {name} in float, so that it cannot be compared' in Log.lines


def test_models_of_other_detectors_are_refused(retinanet):
    detector, _, path = retinanet
    inputs = ncnn_inputs(path, image())
    name = next(iter(inputs))
    with pytest.raises(PTQError, match=f'has no layer {name}; export it again'):
        compare_layer_inputs(detector, {key: value for key, value in inputs.items() if key != name}, image())
    with pytest.raises(PTQError, match=rf'the layer {name} .* reads an input of \(1, 2\), that .*; export it again'):
        compare_layer_inputs(detector, {**inputs, name: np.zeros((1, 2))}, image())


def test_a_model_without_quantized_inputs_has_nothing_to_compare(tmp_path):
    detector, _, path = exported(tmp_path, 'retinanet', overrides={'*': dict(activations=dict(float=True))})
    with pytest.raises(PTQError, match='compares quantized tensors, and the model has none'):
        get_runtime('ncnn').report_agreement(MMLogger.get_current_instance(), detector, path, image())
