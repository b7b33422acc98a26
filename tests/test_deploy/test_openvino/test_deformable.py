"""ONNX's DeformConv in OpenVINO computes what ONNX's own reference does."""

from __future__ import annotations

import io

import numpy as np
import pytest

onnx = pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[openvino]'")
openvino = pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from mmdet_ptq.deploy.openvino.deformable import deformable_extension  # noqa: E402
from mmdet_ptq.deploy.openvino.model import FLOAT32, shared_core  # noqa: E402

CHANNELS, OUTPUTS = 4, 2


def model_of(kernel, bias, mask, strides=(1, 1), pads=(0, 0), dilations=(1, 1), group=1, offset_group=1, size=(4, 5)):
    """A model and what it is given: offsets that leave the image."""
    rng = np.random.default_rng(0)
    out = [
        (side + 2 * pad - dilation * (length - 1) - 1) // stride + 1
        for side, pad, dilation, length, stride in zip(size, pads, dilations, kernel, strides, strict=True)
    ]
    places = offset_group * kernel[0] * kernel[1]
    given = dict(
        x=rng.standard_normal((1, CHANNELS, *size)),
        offset=rng.standard_normal((1, 2 * places, *out)) * 3,
        **(dict(mask=rng.uniform(0, 1, (1, places, *out))) if mask else {}),
    )
    given = {name: value.astype(np.float32) for name, value in given.items()}
    constants = dict(w=rng.standard_normal((OUTPUTS, CHANNELS // group, *kernel)).astype(np.float32))
    if bias:
        constants['b'] = rng.standard_normal(OUTPUTS).astype(np.float32)
    inputs = ['x', 'w', 'offset', 'b' if bias else '', *(['mask'] if mask else [])]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        'DeformConv',
        inputs,
        ['y'],
        'layer',
        kernel_shape=kernel,
        strides=strides,
        pads=[*pads, *pads],
        dilations=dilations,
        group=group,
        offset_group=offset_group,
    )
    graph = helper.make_graph(
        [node],
        'graph',
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in given.items()],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10), given


def check(made):
    model, given = made
    (expected,) = ReferenceEvaluator(model).run(None, given)
    file = io.BytesIO(model.SerializeToString())
    converted = openvino.convert_model(file, extension=[deformable_extension()])
    found = shared_core().compile_model(converted, 'CPU', {**FLOAT32, 'INFERENCE_NUM_THREADS': 1})(given)[0]
    assert found.shape == expected.shape and expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)
    return converted


# a mask comes with a bias: mmdet_ptq.deploy.onnx.deformable writes zeros where mmcv has none
@pytest.mark.parametrize('bias, mask', [(False, False), (True, False), (True, True)])
def test_bias_and_mask_are_read_where_there_are_such(bias, mask):
    converted = check(model_of((3, 2), bias, mask, pads=(1, 0)))
    kinds = [op.get_type_name() for op in converted.get_ops()]
    assert kinds.count('DeformableConvolution') == 1 and kinds.count('Add') == bias


@pytest.mark.parametrize(
    'options',
    [
        dict(kernel=(3, 1), strides=(2, 1), pads=(2, 0)),
        dict(kernel=(2, 3), dilations=(2, 1), pads=(1, 2)),
        dict(kernel=(2, 2), offset_group=4),
        dict(kernel=(2, 2), group=2, offset_group=2, strides=(2, 2), size=(5, 4)),
    ],
    ids=['strides', 'dilations', 'offset groups', 'all'],
)
def test_attributes_are_taken_over(options):
    check(model_of(bias=True, mask=True, **options))


def test_without_it_openvino_knows_no_such_operator():
    model, _ = model_of((3, 3), bias=False, mask=False)
    with pytest.raises(Exception, match='DeformConv'):
        openvino.convert_model(io.BytesIO(model.SerializeToString()))
