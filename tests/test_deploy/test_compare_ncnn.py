import copy

import pytest
import torch

from mmdet_ptq.deploy import get_runtime
from mmdet_ptq.deploy.compare_inputs import compare_layer_inputs, left_float
from mmdet_ptq.engine import export as command
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import SIZE, tiny_quantized

pytest.importorskip('ncnn', reason="needs ncnn: pip install 'mmdet-ptq[ncnn]'")
pytest.importorskip('pnnx', reason="needs pnnx: pip install 'mmdet-ptq[ncnn]'")

from mmdet_ptq.deploy.compare_ncnn import ncnn_inputs

MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'), quantizer=dict(symmetric=True, narrow_range=True))
SHAPE = (1, 3, SIZE, SIZE)


def exported(folder, kind, **ptq):
    detector, structure = tiny_quantized(kind, dict(preset='w8a8_observe', activations=MIN_MAX, **ptq))
    return detector, structure, get_runtime('ncnn').export(detector, folder, SHAPE)


@pytest.fixture(scope='module')
def retinanet(tmp_path_factory):
    return exported(tmp_path_factory.mktemp('retinanet'), 'retinanet')


def image(seed=0):
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


def test_the_comparison_is_told(retinanet):
    detector, structure, path = retinanet

    class Log:
        lines = []
        info = warning = lines.append

    command.report_ncnn(Log, detector, path, image())
    count = sum(len(layer.inputs) for layer in structure.layers)
    assert f'{count} inputs of layers compared with ncnn' in Log.lines[0]
    assert Log.lines[-1] == 'every tensor has at least 99.9% of its codes in common'


def test_inputs_that_ncnn_reads_in_float_are_named(tmp_path):
    name = 'bbox_head.retina_cls'
    detector, structure, path = exported(tmp_path, 'retinanet', overrides={name: dict(activations=dict(bits=16))})
    inputs = ncnn_inputs(path, image())
    layer = next(layer for layer in structure.layers if layer.name == name)
    assert left_float(detector, inputs) == [f'{name}#{call}' if call else name for call in range(len(layer.inputs))]
    assert len(compare_layer_inputs(detector, inputs, image())) == len(inputs)


def test_the_model_of_another_detector_is_refused(retinanet):
    with pytest.raises(PTQError, match='none of the layers of the detector; export it again'):
        compare_layer_inputs(retinanet[0], dict(other=image().numpy()), image())
