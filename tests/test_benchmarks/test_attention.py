"""Attention in float and in integers: the same function, in both runtimes."""

import importlib

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


def test_both_runtimes_compute_attention(capsys, monkeypatch):
    module, size = importlib.import_module('attention'), (2, 10, 8)
    inputs = [np.random.default_rng(i).normal(size=size).astype(np.float32) for i in range(3)]
    q, k, v = inputs
    weights = np.exp(q @ k.transpose(0, 2, 1))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    for opened in (module.in_onnxruntime, module.in_openvino):
        np.testing.assert_allclose(opened(module.attention(size, False))(inputs), expected, atol=1e-4)
        np.testing.assert_allclose(opened(module.attention(size, True))(inputs), expected, atol=0.25)
    monkeypatch.setattr(module, 'SIZES', dict(tiny=size))
    module.main(['--rounds', '2'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all('times float' in line for line in lines[1:])
