import copy

import architectures
import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import RetinaSepBNHead

from mmdet_ptq.deploy import get_runtime, settle_biases
from mmdet_ptq.deploy.agreement import compare_layer_inputs
from mmdet_ptq.deploy.network.meta import write_meta
from mmdet_ptq.deploy.openvino import layer_inputs as module
from mmdet_ptq.deploy.openvino.layer_inputs import openvino_inputs
from mmdet_ptq.deploy.openvino.model import META
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import models, tiny_batch, tiny_model_cfg, tiny_quantized
from mmdet_ptq.wrapping import freeze_weights
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")  # for the exporter's packages
MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
CASES = {  # a folded image and quantizers between the layers; layers that levels share
    'yolox': dict(preset='w8a8_observe', activations=dict(bits=4, **MIN_MAX), dataflow='full'),
    'retinanet': dict(preset='w8a8_observe', activations=MIN_MAX),
}


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(case, id=case[0], marks=() if case[0] == 'retinanet' else pytest.mark.thorough)
        for case in CASES.items()
    ],
)
def exported(request, tmp_path_factory):
    kind, ptq = request.param
    detector, structure = tiny_quantized(kind, ptq)
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = get_runtime('openvino').export(detector, tmp_path_factory.mktemp(kind), (1, 3, 64, 64))
    return detector, structure, path


def image(detector, seed=3):
    return detector.data_preprocessor(tiny_batch(1, seed=seed), False)['inputs']


def compare(detector, path, **kwargs):
    pixels = image(detector)
    return compare_layer_inputs(detector, openvino_inputs(path, pixels), pixels, **kwargs)


def calls(structure):
    return {
        f'{layer.name}#{call}' if call else layer.name
        for layer in structure.layers
        for call in range(len(layer.inputs))
    }


@pytest.mark.thorough
def test_every_layer_reads_what_the_model_was_given(exported):
    detector, structure, path = exported
    found = compare(detector, path, follow=True, within=only_read_tensors)
    assert {entry.name for entry in found} == calls(structure) and len(found) == len(calls(structure))
    assert min(entry.identical for entry in found) > 0.999 and max(entry.largest for entry in found) <= 1


@pytest.mark.thorough
def test_layers_that_feed_no_output_are_not_missed(tmp_path, monkeypatch):
    """YOLOv3 on MobileNetV2 runs a layer behind the last feature map that it reads."""
    model = tiny_model_cfg('retinanet')
    fourth = dict(num_stages=4, strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1))
    monkeypatch.setitem(models.MODELS, 'deep', lambda: {**model, 'backbone': {**model['backbone'], **fourth}})
    detector, structure = tiny_quantized('deep', CASES['retinanet'])
    dead = {call for call in calls(structure) if call.startswith('backbone.layer4')}
    settle_biases(detector, structure)
    path = get_runtime('openvino').export(detector, tmp_path, (1, 3, 64, 64))
    found = {entry.name for entry in compare(detector, path)}
    assert dead and found == calls(structure) - dead


def test_what_openvino_reads_transposed_is_in_the_order_of_the_layer(tmp_path):
    """It takes transpositions into matrix products, as in front of the last layer of deformable attention."""
    import openvino
    from openvino import opset13

    tokens = opset13.parameter([1, 4, 6], np.float32)
    product = opset13.matmul(tokens, opset13.constant(np.ones((3, 4), np.float32)), True, True)
    product.set_friendly_name('attention.output_proj')
    model = openvino.Model([product], [tokens])
    model.set_rt_info(write_meta(dict(layers={'attention.output_proj': 'attention.output_proj'})), [META])
    openvino.save_model(model, tmp_path / 'model.xml', compress_to_fp16=False)
    given = torch.arange(24.0).view(1, 4, 6)
    found = openvino_inputs(tmp_path / 'model.xml', given)
    assert np.array_equal(found['attention.output_proj'], given.transpose(1, 2))


@pytest.mark.thorough
def test_a_call_that_repeats_another_is_computed_once(tmp_path, monkeypatch):
    """RTMDet-Ins has its classification layers a second time where the regression's should be."""
    architectures.register(monkeypatch)
    build = RetinaSepBNHead._init_layers

    def alike(self):
        build(self)
        self.reg_convs = self.cls_convs

    monkeypatch.setattr(RetinaSepBNHead, '_init_layers', alike)
    detector, structure = tiny_quantized('sepbn', CASES['retinanet'])
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = get_runtime('openvino').export(detector, tmp_path, (1, 3, 64, 64))
    inputs, first = openvino_inputs(path, image(detector)), 'bbox_head.cls_convs.0.0.conv'
    assert [f'{first}{call}' in inputs for call in ('', '#1', '#2', '#3')] == [True, False, True, False]
    found = compare(detector, path, follow=True, within=only_read_tensors)
    assert {entry.name for entry in found} == calls(structure)
    # without AVX512 one code of 512 on a boundary falls to the other side
    least = 0.999 if torch.backends.cpu.get_cpu_capability() == 'AVX512' else 0.998
    assert min(entry.identical for entry in found) > least and max(entry.largest for entry in found) <= 1


def test_quantizers_that_openvino_leaves_out_are_seen(exported):
    detector, structure, path = exported
    found = compare(detector, path, follow=True)
    left_out = any(not entry.readers for entry in structure.activations.values())
    assert (min(entry.identical for entry in found) < 0.99) == left_out
    # nothing lies between the image and its own quantizer
    assert found[0].identical == 1


def test_the_layer_behind_a_wrong_bias_is_the_first_to_diverge(exported):
    detector, structure, path = exported
    wrong = copy.deepcopy(detector)
    names = [entry.name for entry in compare(detector, path)]
    with torch.no_grad():
        wrong.get_submodule(names[1]).bias += 1
    found = compare(wrong, path, follow=True, within=only_read_tensors)
    diverging = [entry.name for entry in found if entry.identical < 0.999]
    assert diverging and diverging[0] == names[2]


def test_the_first_layer_that_diverges_is_named(exported):
    detector, structure, path = exported

    class Log:
        lines = []
        info = warning = lines.append

    get_runtime('openvino').report_agreement(Log, detector, path, image(detector))
    text, left_out = '\n'.join(Log.lines), [n for n, e in structure.activations.items() if not e.readers]
    assert f'{len(calls(structure))} inputs of layers' in text
    assert ('the first that diverges is the input of ' in text) == bool(left_out)
    assert (f'{len(left_out)} quantizers between the layers are not in the model' in text) == bool(left_out)
    assert Log.lines[-1] == 'every tensor has at least 99.9% of its codes in common'


def test_a_model_that_watching_changes_is_refused(exported, monkeypatch):
    detector, _, path = exported
    run, runs = module.run_model, []

    def changed(*args):
        runs.append(run(*args))
        return [value + len(runs) * np.float32(1) for value in runs[-1]]

    monkeypatch.setattr(module, 'run_model', changed)
    with pytest.raises(PTQError, match='as soon as its tensors are read; compare in ONNX Runtime'):
        compare(detector, path)
