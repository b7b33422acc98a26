import io

import architectures
import numpy as np
import onnx
import pytest
import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d, deform_conv2d

from mmdet_ptq.deploy import get_runtime, open_model, settle_biases
from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.deploy.onnx.deformable import deformable_nodes
from mmdet_ptq.testing import tiny_batch, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")


class Deformed(torch.nn.Module):
    """Every form that mmcv has, with offsets that leave the image."""

    def __init__(self):
        super().__init__()
        self.plain = DeformConv2d(8, 8, 3, stride=2, padding=1, groups=2, deform_groups=2)
        self.modulated = ModulatedDeformConv2d(
            8, 6, (3, 1), padding=(1, 0), dilation=(2, 1), deform_groups=4, bias=True
        )
        self.without_bias = ModulatedDeformConv2d(8, 6, 1, bias=False)
        self.offsets = torch.nn.Conv2d(8, 36, 3, 2, 1)
        self.others = torch.nn.Conv2d(8, 36, 1)

    def forward(self, x):
        offset, mask = self.others(x).split((24, 12), 1)  # mmcv reads contiguous tensors only
        sampling = x.new_ones(8, 1, 1, 1)  # as TOOD samples
        return (
            self.plain(x, self.offsets(x)),
            self.modulated(x, offset[:, :, :-2].contiguous(), mask[:, :, :-2].sigmoid().contiguous()),
            self.without_bias(x, offset[:, :2], mask[:, :1]),
            deform_conv2d(x, offset[:, :16], sampling, 1, 0, 1, 8, 8),
            # as DyHead gives it offsets of another level
            self.without_bias(x[:, :, ::2, 1::2].contiguous(), offset[:, :2].contiguous(), mask[:, :1].contiguous()),
        )


@pytest.fixture(scope='module')
def deformed():
    torch.manual_seed(0)
    model, image = Deformed().eval(), torch.randn(1, 8, 9, 11)
    model.modulated.bias.data.normal_()
    with torch.no_grad():
        expected = [output.numpy() for output in model(image)]
        with deformable_nodes():
            program = torch.onnx.export(model, (image,), dynamo=True, opset_version=21, verbose=False)
        # mmcv's own again
        assert torch.equal(model(image)[0], torch.from_numpy(expected[0]))
    file = io.BytesIO()
    onnx.save(program.model_proto, file)
    return image.numpy(), expected, file.getvalue()


def test_onnxruntime_computes_what_mmcv_does(deformed):
    onnxruntime = pytest.importorskip('onnxruntime')
    image, expected, model = deformed
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    for ours, theirs in zip(expected, session.run(None, {session.get_inputs()[0].name: image}), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_openvino_computes_what_mmcv_does(deformed):
    openvino = pytest.importorskip('openvino')
    from mmdet_ptq.deploy.openvino.deformable import deformable_extension
    from mmdet_ptq.deploy.openvino.model import FLOAT32

    image, expected, model = deformed
    converted = openvino.convert_model(io.BytesIO(model), extension=[deformable_extension()])
    found = openvino.Core().compile_model(converted, 'CPU', FLOAT32)([image])
    for place, ours in enumerate(expected):
        np.testing.assert_allclose(found[place], ours, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize(
    ('kind', 'left', 'integer'),
    [
        ('tood', 'bbox_head.inter_convs.0.conv', 'bbox_head.inter_convs.1.conv'),
        (
            'dyhead',
            'neck.1.dyhead_blocks.0.spatial_conv_mid.conv',
            'neck.1.dyhead_blocks.0.task_attn_module.conv2.conv',
        ),
    ],
)
def test_a_detector_with_them_computes_what_was_simulated_and_names_them(
    kind, left, integer, runtime, tmp_path, monkeypatch
):
    pytest.importorskip(runtime)
    architectures.register(monkeypatch)
    detector, structure = tiny_quantized(kind, dict(OBSERVE, dataflow='auto'))
    settle_biases(detector, structure)
    assert any('ModulatedDeformConv2d' in entry['operation'] for entry in structure.uncovered)
    model = open_model(get_runtime(runtime).export(detector, tmp_path, (1, 3, 64, 64)), 1)
    assert left in model.coverage().float and integer in model.coverage().integer
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    given = only_read_tensors if runtime == 'openvino' else integer_arithmetic
    with torch.no_grad(), given(detector):
        expected = [output.numpy() for output in RawOutputs(detector)(image)]
    for ours, theirs in zip(expected, model(image.numpy()), strict=True):
        assert np.abs(ours - theirs).mean() <= 0.01 * ours.std()
