"""Exported models made to run something, or to cost a machine; see test_hostile_files.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hostile import OLD, expect, within_limits

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


def graph_of(change):
    """A good model whose graph was changed."""

    def write(path, trap):
        import onnx

        model = onnx.load(OLD / 'model.onnx')
        change(model)
        path.write_bytes(model.SerializeToString())

    return write


def computed(nodes, told=(), **constants):
    """A good model that computes something more, and puts out the sum of it: a runtime may do so beforehand.

    Args:
        nodes: (type, inputs, output, attributes) of each; the last one is summed.
        told: Shape that the file tells of the last one.
        **constants: What they read.
    """

    def change(model):
        from onnx import helper, numpy_helper

        for name, value in constants.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        for kind, inputs, output, attributes in nodes:
            model.graph.node.append(helper.make_node(kind, inputs, [output], **attributes))
        model.graph.node.append(helper.make_node('ReduceSum', [nodes[-1][2]], ['sum'], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info('sum', 1, []))
        model.graph.value_info.extend([helper.make_tensor_value_info('big', 1, told)] if told else [])

    return graph_of(change)


def within_a_body(model):
    from onnx import helper, numpy_helper

    grown = [
        helper.make_node('Expand', ['number', 'large'], ['big']),
        helper.make_node('ReduceSum', ['big'], ['inner']),
    ]
    body = helper.make_graph(grown, 'body', [], [helper.make_tensor_value_info('inner', 1, None)])
    for name, value in dict(number=np.ones(1, np.float32), large=[2**32], yes=True).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    model.graph.node.append(helper.make_node('If', ['yes'], ['sum'], then_branch=body, else_branch=body))
    model.graph.output.append(helper.make_tensor_value_info('sum', 1, None))


def large_input(model):
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_value = dims[3].dim_value = 10**6


def more_than_it_has(model):
    model.graph.initializer[0].dims[:] = [2**20, 2**20]


def sparse(model):
    from onnx import TensorProto, helper

    values = helper.make_tensor('sparse', TensorProto.FLOAT, [1], [1.0])
    places = helper.make_tensor('places', TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [10**6, 10**6]))


def doubling_functions(model):
    """A function that calls another twice, which calls another twice, ..."""
    from onnx import helper

    opset = [helper.make_opsetid('', 21), helper.make_opsetid('own', 1)]
    for number in range(40):
        inner = dict(domain='own') if number else {}
        kind = f'f{number - 1}' if number else 'Relu'
        nodes = [helper.make_node(kind, ['x'], ['y'], **inner), helper.make_node(kind, ['y'], ['z'], **inner)]
        model.functions.append(helper.make_function('own', f'f{number}', ['x'], ['z'], nodes, opset))
    model.opset_import.append(opset[1])
    model.graph.node.append(helper.make_node('f39', ['input'], ['many'], domain='own'))
    model.graph.output.append(helper.make_tensor_value_info('many', 1, None))


EXPAND = ('Expand', ['one', 'shape'], 'big', {})

MODELS = {
    'an endless image': (meta_of(input_shape=[1, 3, 10**6, 10**6]), 'no size of an image'),
    'meta that is no meta': (meta_of(layers=7), 'layers'),
    'an unknown field': (meta_of(command='x'), 'unknown field `command`'),
    'nested meta': (nested_meta, 'cannot be read'),
    'weights of somewhere else': (outside, 'keeps its weights'),
    'a constant that grows': (
        computed([EXPAND], one=np.ones(1, np.float32), shape=[2**32]),
        "16.0 GiB for 'big' .Expand",
    ),
    'a constant that tells of less': (
        computed([EXPAND], told=[4], one=np.ones(1, np.float32), shape=[2**32]),
        "16.0 GiB for 'big'",
    ),
    'a tensor of zeros': (
        computed([('ConstantOfShape', ['shape'], 'big', {})], shape=[2**16, 2**16]),
        "16.0 GiB for 'big'",
    ),
    'an image many times': (
        computed([('Tile', ['input', 'times'], 'big', {})], times=[1, 1, 10**3, 10**3]),
        "for 'big' .Tile",
    ),
    'an image with a border': (
        computed([('Pad', ['input', 'pads'], 'big', {})], pads=[0, 0, 0, 0, 0, 0, 10**5, 10**5]),
        "for 'big' .Pad",
    ),
    'an image made larger': (
        computed([('Resize', ['input', '', 'scales'], 'big', {})], scales=np.float32([1, 1, 1000, 1000])),
        "for 'big' .Resize",
    ),
    'a count': (
        computed([('Range', ['zero', 'end', 'step'], 'big', {})], zero=0, end=2**33, step=1),
        "for 'big' .Range",
    ),
    'all with all': (
        computed(
            [
                ('Reshape', ['input', 'column'], 'tall', {}),
                ('Reshape', ['input', 'row'], 'wide', {}),
                ('Mul', ['tall', 'wide'], 'all', {}),
                ('Reshape', ['all', 'column'], 'taller', {}),
                ('Mul', ['taller', 'wide'], 'big', {}),
            ],
            column=[-1, 1],
            row=[1, -1],
        ),
        "0.6 GiB for 'taller' .Reshape",
    ),
    'a shape that is computed': (
        computed(
            [
                ('Shape', ['input'], 'size', {}),
                ('Mul', ['size', 'much'], 'larger', {}),
                ('ConstantOfShape', ['larger'], 'big', {}),
            ],
            much=[1000, 1, 1000, 1000],
        ),
        "for 'big' .ConstantOfShape",
    ),
    'many that are large together': (
        computed(
            [
                *(('Expand', ['one', 'shape'], f'part{n}', {}) for n in range(8)),
                ('Sum', [f'part{n}' for n in range(8)], 'big', {}),
            ],
            one=np.ones(1, np.float32),
            shape=[2**26],
        ),
        "takes 1.0 GiB .* 0.2 GiB for 'part0'",
    ),
    'an image of another size': (graph_of(large_input), 'where its images need less'),
    'more weights than there are': (graph_of(more_than_it_has), 'cannot open'),
    'sparse weights': (graph_of(sparse), 'has sparse constants'),
    'functions that double': (graph_of(doubling_functions), 'has functions'),
}


@pytest.mark.parametrize(('write', 'told'), MODELS.values(), ids=MODELS)
def test_an_exported_model_is_data(trap, write, told):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    path = trap.folder / 'model.onnx'
    write(path, trap)
    expect(within_limits(lambda: open_model(path)), told)


# how large it becomes depends on the image, or stands where ONNX's inference tells nothing
GROW_WHEN_RUN = {
    'a body': graph_of(within_a_body),
    'pixels that tell a size': computed(
        [
            ('ReduceMax', ['input'], 'most', dict(keepdims=0)),
            ('Mul', ['most', 'much'], 'product', {}),
            ('Cast', ['product'], 'whole', dict(to=7)),
            ('Reshape', ['whole', 'one'], 'shape', {}),
            ('ConstantOfShape', ['shape'], 'big', {}),
        ],
        much=np.float32(2**32),
        one=[1],
    ),
    'places against places': computed(
        [
            ('NonZero', ['input'], 'places', {}),
            ('Transpose', ['places'], 'rows', dict(perm=[1, 0])),
            ('Unsqueeze', ['rows', 'one'], 'each', {}),
            ('Sub', ['each', 'rows'], 'differences', {}),
            ('Cast', ['differences'], 'big', dict(to=1)),
        ],
        one=[1],
    ),
}


@pytest.mark.parametrize('write', GROW_WHEN_RUN.values(), ids=GROW_WHEN_RUN)
def test_what_only_a_run_can_tell_is_bounded_in_the_run(trap, write):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    path = trap.folder / 'model.onnx'
    write(path, trap)
    model, image = open_model(path), np.ones((1, 3, 64, 64), np.float32)
    expect(within_limits(lambda: model(image)), 'running a model of onnxruntime takes more than')


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


def openvino_model(make):
    """A model of one operation."""

    def write(folder):
        import openvino
        from openvino import opset13 as ops

        given = ops.parameter([1, 3, 64, 64], np.float32)
        model = openvino.Model([ops.reduce_sum(make(ops, given), [0, 1, 2, 3])], [given])
        meta = dict(format='mmdet_ptq.onnx', version='0', runtime='openvino', input_shape=[1, 3, 64, 64], layers={})
        meta |= dict(dynamic_batch=False, outputs=[0], raw_shapes=[[1]])
        model.set_rt_info(json.dumps(meta), ['mmdet_ptq'])
        openvino.save_model(model, folder / 'model.xml', compress_to_fp16=False)
        return folder / 'model.xml'

    return write


def as_large_as_a_pixel_is_bright(ops, given):
    size = ops.convert(ops.multiply(ops.reduce_max(given, [0, 1, 2, 3]), ops.constant(np.float32(10**5))), 'i64')
    return ops.broadcast(ops.reduce_max(given, [0, 1, 2, 3]), ops.broadcast(size, [4]))


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
    'a constant that grows': (
        'openvino',
        openvino_model(lambda ops, given: ops.broadcast(np.float32(1), [1, 1, 2**16, 2**16])),
        '16.0 GiB for .* .Broadcast',
    ),
    'an image many times': (
        'openvino',
        openvino_model(lambda ops, given: ops.tile(given, [1, 1, 1000, 1000])),
        'GiB for .* .Tile',
    ),
    'an image with a border': (
        'openvino',
        openvino_model(lambda ops, given: ops.pad(given, [0, 0, 0, 0], [0, 0, 10**5, 10**5], 'constant')),
        'GiB for .* .Pad',
    ),
    'entities': ('openvino', entities, 'not exported by mmdet-ptq|no OpenVINO model'),
}


@pytest.mark.parametrize(('package', 'write', 'told'), OTHERS.values(), ids=OTHERS)
def test_a_model_of_another_runtime_is_data(trap, package, write, told):
    pytest.importorskip(package, reason=f"needs pip install 'mmdet-ptq[{package}]'")
    path = write(trap.folder)
    expect(within_limits(lambda: open_model(path)), told)


WHEN_RUN = {
    'a border': ('ncnn', ncnn_layer(type='Padding', params={0: '100000', 1: '0', 2: '100000', 3: '0'})),
    'an image made larger': ('ncnn', ncnn_layer(type='Interp', params={0: '1', 3: '100000', 4: '100000'})),
    'an image many times': ('ncnn', ncnn_layer(type='Tile', params={0: '0', 1: '1000000'})),
    'a size that pixels tell': ('openvino', openvino_model(as_large_as_a_pixel_is_bright)),
}


@pytest.mark.parametrize(('package', 'write'), WHEN_RUN.values(), ids=WHEN_RUN)
def test_what_a_runtime_does_not_tell_is_bounded_in_the_run(trap, package, write):
    pytest.importorskip(package, reason=f"needs pip install 'mmdet-ptq[{package}]'")
    model, image = open_model(write(trap.folder)), np.ones((1, 3, 64, 64), np.float32)
    expect(within_limits(lambda: model(image)), 'takes more than|not enough memory|cannot run')
