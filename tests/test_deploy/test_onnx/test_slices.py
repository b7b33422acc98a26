"""Writes into slices, as exported."""

import numpy as np
import pytest
import torch
from torch import nn

from mmdet_ptq.deploy.onnx.slices import slice_translations

onnxruntime = pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")


class Writes(nn.Module):
    """At the end, at the beginning, in between, everywhere, counted from behind, and every second one."""

    def forward(self, x, y):
        x, y = x + 0, y + 0
        x[..., 4:] *= 2
        x[..., :3] = y[..., :3]
        x[:, 1:3] += y[:, :2]
        x[:] -= 1
        y[..., -2:] = x[..., :2]
        y[..., ::2] *= 3
        return x, y


@pytest.mark.parametrize('open_rows', [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_they_compute_the_same_and_are_concats_where_the_size_is_known(open_rows):
    given = tuple(torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    shapes = ({1: torch.export.Dim('rows', min=4)},) * 2 if open_rows else None
    program = torch.onnx.export(
        Writes().eval(),
        given,
        dynamo=True,
        opset_version=21,
        dynamic_shapes=shapes,
        custom_translation_table=slice_translations(),
        verbose=False,
    )
    kinds = [node.op_type for node in program.model.graph]
    # what steps over places, or lies along an open side, stays torch's own
    assert kinds.count('ScatterND') == (4 if open_rows else 2) and kinds.count('Concat') >= 4
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=['CPUExecutionProvider'])
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
    for ours, theirs in zip(found, Writes()(*given), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6)
