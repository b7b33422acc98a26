"""Operations that no exporter knows compute the same, made of others."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import CornerPool

from mmdet_ptq.deploy.network.standard_operations import standard_operations
from mmdet_ptq.errors import PTQError

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")


class All(torch.nn.Module):
    """Corner pooling in all directions, cells of one size and of several."""

    def __init__(self):
        super().__init__()
        self.corners = torch.nn.ModuleList(CornerPool(mode) for mode in ('bottom', 'left', 'right', 'top'))

    def forward(self, x):
        return (
            *(corner(x) for corner in self.corners),
            F.adaptive_max_pool2d(x, (3, 5)),
            F.adaptive_max_pool2d(x, (4, 3)),
            torch.nn.AdaptiveMaxPool2d((None, 7))(x),
        )


@pytest.fixture(scope='module')
def computed():
    torch.manual_seed(0)
    model, image = All().eval(), torch.randn(2, 6, 9, 10)
    with torch.no_grad():
        expected = [output.numpy() for output in model(image)]
        with standard_operations():
            ours = [output.numpy() for output in model(image)]
            program = torch.onnx.export(model, (image,), dynamo=True, opset_version=21, verbose=False)
    file = io.BytesIO()
    onnx.save(program.model_proto, file)
    return image.numpy(), expected, ours, file.getvalue()


def test_the_numbers_are_the_same(computed):
    _, expected, ours, _ = computed
    for theirs, own in zip(expected, ours, strict=True):
        np.testing.assert_array_equal(own, theirs)


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_runtimes_compute_them(computed, runtime):
    module = pytest.importorskip(runtime)
    image, expected, _, model = computed
    if runtime == 'onnxruntime':
        session = module.InferenceSession(model, providers=['CPUExecutionProvider'])
        found = session.run(None, {session.get_inputs()[0].name: image})
    else:
        core = module.Core()
        found = core.compile_model(core.read_model(model), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})([image])
        found = [found[index] for index in range(len(expected))]
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_array_equal(theirs, ours)


def test_without_them_nothing_is_exported():
    for function in (lambda x: torch.cummax(x, 2)[0], lambda x: F.adaptive_max_pool2d(x, 3)):
        module = torch.nn.Module()
        module.forward = function
        with pytest.raises(torch.onnx.errors.OnnxExporterError):
            torch.onnx.export(module, (torch.zeros(1, 2, 8, 9),), dynamo=True, verbose=False)


def test_indices_are_refused():
    with standard_operations(), pytest.raises(PTQError, match='with indices cannot be exported'):
        F.adaptive_max_pool2d(torch.zeros(1, 2, 8, 9), 3, return_indices=True)
