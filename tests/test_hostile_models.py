"""Exported models made to run something, or to cost a machine; see test_hostile_files.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hostile import LOADS, OLD, expect, within_limits

from mmdet_ptq.deploy import open_model

# each may take seconds of its time bound; a process of its own keeps what is left of limits away from other tests


def meta_of(**changes):
    def write(path, trap):
        import onnx

        model = onnx.load(OLD / 'model.onnx')
        entry = next(e for e in model.metadata_props if e.key == 'mmdet_ptq')
        entry.value = json.dumps({**json.loads(entry.value), **changes})
        onnx.save(model, path)

    return write


def nested_meta(path, trap):
    import onnx

    model = onnx.load(OLD / 'model.onnx')
    entry = next(e for e in model.metadata_props if e.key == 'mmdet_ptq')
    entry.value = '[' * 10**6
    onnx.save(model, path)


def outside(path, trap):
    """Weights that lie in a file somewhere else on the machine."""
    import onnx

    model = onnx.load(OLD / 'model.onnx')
    tensor = model.graph.initializer[0]
    tensor.ClearField('raw_data')
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key='location', value='../../../../../../etc/passwd')
    path.write_bytes(model.SerializeToString())


def growing(path, trap):
    """A constant of 16 GiB, which a runtime could compute beforehand."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(OLD / 'model.onnx')
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**32]), 'big_shape'))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), 'big_one'))
    model.graph.node.append(helper.make_node('Expand', ['big_one', 'big_shape'], ['big']))
    model.graph.node.append(helper.make_node('ReduceSum', ['big'], ['big_sum'], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info('big_sum', 1, []))
    path.write_bytes(model.SerializeToString())


MODELS = {
    'an endless image': (meta_of(input_shape=[1, 3, 10**6, 10**6]), 'no size of an image'),
    'meta that is no meta': (meta_of(layers=7), 'layers'),
    'an unknown field': (meta_of(command='x'), 'unknown field `command`'),
    'nested meta': (nested_meta, 'cannot be read'),
    'weights of somewhere else': (outside, 'cannot open|keeps its weights'),
    'a constant that grows': (growing, LOADS),
}


@pytest.mark.parametrize(('write', 'told'), MODELS.values(), ids=MODELS)
def test_an_exported_model_is_data(trap, write, told):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    path = trap.folder / 'model.onnx'
    write(path, trap)
    expect(within_limits(lambda: open_model(path)), told)


def ncnn_layer(**params):
    """A network of one layer that tells of more than it has."""

    def write(folder):
        from mmdet_ptq.deploy.ncnn.format import NcnnLayer, write_network

        meta = dict(format='mmdet_ptq.ncnn', version='0', runtime='ncnn', input_shape=[1, 3, 64, 64], layers={})
        layers = [
            NcnnLayer('Input', 'in0', [], ['in0']),
            NcnnLayer(params['type'], 'x', ['in0'], ['out0'], params['params'], b'0' * 40),
        ]
        return write_network(layers, folder, {**meta, 'dynamic_batch': False, 'outputs': [0], 'raw_shapes': [[1]]})

    return write


def entities(folder):
    """Text that doubles itself, and a file of the machine."""
    folder.joinpath('model.bin').write_bytes(b'')
    doubled = ''.join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    path = folder / 'model.xml'
    path.write_text(
        f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a0 "aaaaaaaaaa">{doubled}<!ENTITY f SYSTEM "file:///etc/passwd">]>'
        '<net name="&a11;&f;" version="11"><layers></layers><edges></edges></net>'
    )
    return path


OTHERS = {
    'more weights than there are': (
        'ncnn',
        ncnn_layer(type='InnerProduct', params={0: '10', 1: '1', 2: '2000000000'}),
        'cannot load',
    ),
    'a number beyond numbers': (
        'ncnn',
        ncnn_layer(type='InnerProduct', params={0: '10', 2: '1000000000000'}),
        'cannot load',
    ),
    'a long array': ('ncnn', ncnn_layer(type='Reshape', params={-23300: '1000000000,1'}), 'cannot load'),
    'an unknown layer': ('ncnn', ncnn_layer(type='System', params={}), 'cannot load'),
    'entities': ('openvino', entities, 'not exported by mmdet-ptq|no OpenVINO model'),
}


@pytest.mark.parametrize(('package', 'write', 'told'), OTHERS.values(), ids=OTHERS)
def test_a_model_of_another_runtime_is_data(trap, package, write, told):
    pytest.importorskip(package, reason=f"needs pip install 'mmdet-ptq[{package}]'")
    path = write(trap.folder)
    expect(within_limits(lambda: open_model(path)), told)
