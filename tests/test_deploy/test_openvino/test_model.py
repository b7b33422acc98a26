"""Layers in OpenVINO's models, by the names of their calls."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest

openvino = pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")

from openvino import opset13 as ops  # noqa: E402

from mmdet_ptq.deploy.openvino.model import FLOAT32, layer_operations, shared_core  # noqa: E402

PLAIN = ([1, 1], [0, 0], [0, 0], [1, 1])
RNG = np.random.default_rng(0)


def named(operation, name):
    operation.set_friendly_name(name)
    return operation


def weight(*shape):
    return ops.constant(RNG.standard_normal(shape).astype(np.float32))


@pytest.fixture
def model():
    given = ops.parameter([1, 4, 6, 6], np.float32, 'image')
    x = named(ops.convolution(given, weight(4, 4, 1, 1), *PLAIN), 'conv/WithoutBiases')
    x = named(ops.add(x, weight(1, 4, 1, 1)), 'conv')
    x = named(ops.group_convolution(x, weight(2, 2, 2, 1, 1), *PLAIN), 'grouped')
    x = named(ops.convolution_backprop_data(x, weight(4, 4, 2, 2), strides=[2, 2]), 'up/WithoutBiases')
    x = named(ops.group_convolution_backprop_data(x, weight(2, 2, 2, 1, 1), strides=[1, 1]), 'up#1')
    # as where a graph has two operations of one call
    x = named(ops.matmul(x, weight(12, 3), False, False), 'linear')
    x = named(ops.matmul(x, weight(3, 5), False, False), 'linear/other')
    x = named(ops.relu(x), 'activation')
    return openvino.Model([x], [given])


def test_each_call_is_found_under_its_name(model):
    calls = ['conv', 'grouped', 'up', 'up#1', 'linear', 'activation', 'image', 'nowhere']
    found = layer_operations(model, calls)
    assert {name: (op.get_friendly_name(), op.get_type_name()) for name, op in found.items()} == {
        'conv': ('conv/WithoutBiases', 'Convolution'),
        'grouped': ('grouped', 'GroupConvolution'),
        'up': ('up/WithoutBiases', 'ConvolutionBackpropData'),
        'up#1': ('up#1', 'GroupConvolutionBackpropData'),
        'linear': ('linear', 'MatMul'),
    }
    # in the order in which they run
    assert list(found) == ['conv', 'grouped', 'up', 'up#1', 'linear']
    assert found['linear'].output(0).get_partial_shape()[3].get_length() == 3


def test_only_the_calls_that_are_asked_for_are_found(model):
    assert list(layer_operations(model, ['up#1', 'up#2'])) == ['up#1']
    assert layer_operations(model, []) == {}
    assert list(layer_operations(model, {'grouped': 'layer'})) == ['grouped']


def test_there_is_one_core_which_is_never_given_back():
    core, kept = shared_core(), functools.cache(object)
    assert shared_core() is core
    other = kept()
    # somebody else holds it besides the cache
    assert sys.getrefcount(core) > sys.getrefcount(other)


def test_what_is_not_quantized_stays_exact(model):
    compiled = shared_core().compile_model(model, 'CPU', FLOAT32)
    assert compiled.get_property('INFERENCE_PRECISION_HINT').to_string() in ('f32', 'float32')
