"""Products of two activations in exported graphs: runtimes compute them in integers, and what was simulated."""

import numpy as np
import pytest
import torch
from architectures import register

from mmdet_ptq.deploy import get_runtime, open_model, settle_biases
from mmdet_ptq.deploy.agreement import compare_layer_inputs
from mmdet_ptq.deploy.onnx.export import model_meta
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.deploy.openvino.layer_inputs import openvino_inputs
from mmdet_ptq.testing import tiny_batch, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import freeze_weights
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
RUNTIMES = ('onnxruntime', *(pytest.param(name, marks=pytest.mark.thorough) for name in ('openvino', 'tensorrt')))


@pytest.fixture(scope='module', params=RUNTIMES)
def exported(request, tmp_path_factory):
    runtime = request.param
    if runtime == 'openvino':
        pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        detector, structure = tiny_quantized('swin', {**OBSERVE, 'export': [runtime]})
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = get_runtime(runtime).export(detector, tmp_path_factory.mktemp(runtime), (1, 3, 64, 64))
    return runtime, detector, structure, path


def test_they_are_in_integers_and_compute_what_was_simulated(exported):
    runtime, detector, structure, path = exported
    names = [product['factors'][0].removesuffix('/left').replace('/', '.') for product in structure.products]
    assert len(names) == 12
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    if runtime == 'tensorrt':  # no engine is built here; its rules were checked as the file was written
        assert model_meta(path)['products'] == names
        return
    coverage = open_model(path).coverage()
    assert set(names) <= set(coverage.integer) and not coverage.float
    assert len(coverage.integer) == len(set(coverage.integer)) == sum(len(x.inputs) for x in structure.layers) + 12
    if runtime == 'onnxruntime':
        found = {agreement.name: agreement for agreement in compare_codes(detector, path, image, exact=True)}
        assert {name for product in structure.products for name in product['factors']} <= found.keys()
        assert all(agreement.identical == 1 for agreement in found.values())
    else:
        found = compare_layer_inputs(
            detector, openvino_inputs(path, image), image, within=only_read_tensors, follow=True
        )
        names = {agreement.name for agreement in found}
        assert {name for product in structure.products for name in product['factors']} <= names
        assert min(agreement.identical for agreement in found) > 0.999


@torch.no_grad()
def test_what_a_product_reads_are_codes(exported):
    runtime, detector, structure, path = exported
    if runtime != 'onnxruntime':
        pytest.skip('the codes are looked at in ONNX Runtime')
    import onnx

    graph = onnx.load(path).graph
    made = {out: node for node in graph.node for out in node.output}
    for node in graph.node:
        if node.name in model_meta(path)['products']:
            for value in node.input:
                while made[value].op_type in ('Transpose', 'Reshape', 'QuantizeLinear', 'Expand'):
                    value = made[value].input[0]
                assert made[value].op_type == 'DequantizeLinear'
    zero = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    factors = [
        n for n in graph.node if n.op_type == 'QuantizeLinear' and n.output[0].endswith(('left:codes', 'right:codes'))
    ]
    assert len(factors) == 24 and {zero[n.input[2]].dtype for n in factors} == {np.dtype('uint8')}
    assert {int(zero[n.input[2]]) for n in factors} == {0, 128}
