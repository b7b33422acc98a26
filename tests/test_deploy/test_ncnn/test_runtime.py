"""ncnn as one of the runtimes: batches, what it computes in integers, and which formats it takes."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from mmdet_ptq.deploy import get_runtime, open_model
from mmdet_ptq.deploy.ncnn import runtime as module
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import build_quantizer
from mmdet_ptq.wrapping import LayerStructure, Structure
from mmdet_ptq.wrapping.structure import ActivationStructure

pytest.importorskip('ncnn', reason="needs ncnn: pip install 'mmdet-ptq[ncnn]'")

from mmdet_ptq.deploy.ncnn.format import NcnnLayer, floats, int8_weight, write_network
from mmdet_ptq.deploy.ncnn.runtime import NcnnRuntime

SHAPE = [1, 2, 3, 5]
META = dict(
    format='mmdet_ptq.ncnn',
    version='0',
    runtime='ncnn',
    input_shape=SHAPE,
    dynamic_batch=False,
    outputs=[0, 1],
    layers=dict(ptq_0='backbone.conv', ptq_1='backbone.conv#1', ptq_2='head'),
)


def layers():
    """Two pointwise convolutions, in integers and in float, that swap the channels, and what has no counterpart."""
    sizes, swapped = {0: '2', 1: '1', 6: '4'}, np.array([[0, 1], [1, 0]])
    integer = NcnnLayer('Convolution', 'ptq_0', ['a'], ['out0'], {**sizes, 8: '2'})
    # codes of -127 .. 127 that mean tenths
    integer.weights = int8_weight(swapped) + floats([1, 1]) + floats([10])
    flat = NcnnLayer('Convolution', 'ptq_1', ['b'], ['out1'], dict(sizes), bytes(4) + floats(swapped))
    return [NcnnLayer('Input', 'in0', [], ['in0']), NcnnLayer('Split', 'split', ['in0'], ['a', 'b']), integer, flat]


@pytest.fixture
def model(tmp_path):
    return NcnnRuntime(write_network(layers(), tmp_path, META))


def test_a_batch_is_its_images(model):
    images = np.random.default_rng(0).uniform(-3, 3, (4, *SHAPE[1:]))
    rounded, exact = model(images)
    assert exact.dtype == np.float32 and exact.shape == rounded.shape == images.shape
    np.testing.assert_allclose(exact, images[:, ::-1], rtol=1e-6)
    np.testing.assert_allclose(rounded, np.rint(images * 10)[:, ::-1] / 10, atol=1e-5)
    # neither memory in another order nor single images change anything
    turned = np.asfortranarray(images.astype(np.float32))
    for ours, theirs in zip(model(turned), (rounded, exact), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(model(images[2:3]), (rounded, exact), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[2])


def test_coverage_is_that_of_the_formats_in_the_file(model):
    found = model.coverage()
    assert found.integer == ['backbone.conv']
    # a call without a layer of its own stayed float
    assert found.float == ['backbone.conv#1', 'head']
    assert model.whole_coverage() == found


def test_the_suffix_tells_the_runtime(tmp_path):
    model = open_model(write_network(layers(), tmp_path, META), threads=2)
    assert type(model) is NcnnRuntime is get_runtime('ncnn')
    # its kernels add products in 32 bits
    assert model.remark() == '' and not model.saturates()


def test_a_network_of_others_is_refused(tmp_path):
    with pytest.raises(PTQError, match=r'model\.param. was not exported by mmdet-ptq; make one with tools/export\.py'):
        NcnnRuntime(write_network(layers(), tmp_path, {}))


@pytest.mark.parametrize('bits, given', [(8, True), (7, False), (4, False), (16, False)])
def test_what_it_needs_of_activations_fits_it(bits, given):
    needed = NcnnRuntime.needed_activations(bits)
    assert bool(needed) == given
    spec = build_quantizer(dict(type='mmdet_ptq.AffineQuantizer', bits=bits, num_channels=3, **needed)).spec()
    layer = LayerStructure('conv', 'convolution', 'backbone', 1, 1, None, ['conv'])
    NcnnRuntime.check_formats(Structure(layers=[layer], activations={'conv': ActivationStructure(spec, 1)}))


def test_it_has_no_onnx_file_and_no_open_sizes():
    with pytest.raises(PTQError, match=r'ncnn reads no ONNX files; export to it with `mmdet-ptq-export --to ncnn`'):
        NcnnRuntime.dialect()
    with pytest.raises(PTQError, match=r'ncnn takes images of one size, onnxruntime and openvino.* any'):
        NcnnRuntime.check_dynamic_size(nn.Module())


def test_batches_that_stay_open_are_told_to_change_nothing(tmp_path, monkeypatch):
    said, given = [], []
    monkeypatch.setattr(module, 'print_log', lambda text, *_: said.append(text))
    monkeypatch.setattr(module, 'export_ncnn', lambda *arguments: given.append(arguments) or tmp_path / 'model.param')
    detector = nn.Identity()
    for options in ({}, dict(dynamic_batch=True)):
        assert NcnnRuntime.export(detector, tmp_path, (2, 3, 8, 8), **options) == tmp_path / 'model.param'
    assert said == ['ncnn: networks take one image at a time; --dynamic-batch changes nothing']
    assert given[0] == given[1] and given[0][0] is detector
