"""Sizes of a graph's tensors before it is read: what grows, hides or leads out of the file is refused."""

import numpy as np
import pytest

from mmdet_ptq.deploy.onnxruntime.memory import check_onnx_memory
from mmdet_ptq.errors import PTQError

onnx = pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
META = dict(input_shape=[1, 3, 8, 8])


def tensor(name, array):
    return onnx.numpy_helper.from_array(np.asarray(array), name)


def model(nodes, constants=(), shape=(1, 3, 8, 8), **more):
    ends = [onnx.helper.make_tensor_value_info('x', FLOAT, shape), onnx.helper.make_tensor_value_info('y', FLOAT, None)]
    nodes = [onnx.helper.make_node(kind, given, out, **options) for kind, given, out, options in nodes]
    graph = onnx.helper.make_graph(nodes, 'graph', ends[:1], ends[1:], list(constants), **more)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 21)])


@pytest.fixture
def check(tmp_path):
    def run(made, meta=META):
        path = tmp_path / 'model.onnx'
        onnx.save(made, path)
        return check_onnx_memory(path, meta)

    return run


def test_a_network_of_the_size_of_its_images_is_taken(check):
    weight = tensor('w', np.ones((4, 3, 3, 3), np.float32))
    made = model([('Conv', ['x', 'w'], ['a'], {}), ('Relu', ['a'], ['y'], {})], [weight])
    assert check(made) is True
    # what the graph leaves open is what the meta tells
    open_sizes = model([('Conv', ['x', 'w'], ['y'], {})], [weight], shape=('n', 3, 'h', 'w'))
    assert check(open_sizes) is True
    assert check(open_sizes, dict(inputs=[[2, 3, 16, 16]], input_shape=[1, 3, 8, 8])) is True


@pytest.mark.parametrize('inside', [False, True])
def test_a_tensor_that_no_image_explains_is_refused_by_its_name(check, inside):
    constants = [tensor('one', np.ones(1, np.float32)), tensor('size', [1000, 1000, 1000])]
    expand = ('Expand', ['one', 'size'], ['huge'], {})
    if inside:
        node, made = onnx.helper.make_node(*expand[:3]), onnx.helper.make_tensor_value_info('huge', FLOAT, None)
        body = onnx.helper.make_graph([node], 'body', [], [made], constants)
        made = model([('If', ['flag'], ['y'], dict(then_branch=body, else_branch=body))], [tensor('flag', True)])
    else:
        made = model([expand, ('ReduceSum', ['huge'], ['y'], {})], constants)
    with pytest.raises(PTQError, match=r"model.onnx' takes 3\.7 GiB of memory .* for 'huge' \(Expand\) alone"):
        check(made)


def test_sizes_that_only_a_run_tells_are_said_to_be_unknown(check):
    assert check(model([('NonZero', ['x'], ['a'], {}), ('Cast', ['a'], ['y'], dict(to=FLOAT))])) is False


def test_no_shape_is_believed_that_the_file_tells_itself(check):
    made = model(
        [('Expand', ['one', 'size'], ['huge'], {}), ('Relu', ['huge'], ['y'], {})],
        [tensor('one', np.ones(1, np.float32)), tensor('size', [1000, 1000, 1000])],
    )
    made.graph.value_info.append(onnx.helper.make_tensor_value_info('huge', FLOAT, [1]))
    del made.graph.output[:]
    made.graph.output.append(onnx.helper.make_tensor_value_info('y', FLOAT, [1]))
    with pytest.raises(PTQError, match='takes .* GiB of memory'):
        check(made)


def test_what_grows_while_it_is_read_or_leads_out_of_the_file_is_refused(check):
    relu = [('Relu', ['x'], ['y'], {})]
    function = onnx.helper.make_function(
        'own', 'F', ['a'], ['b'], [onnx.helper.make_node('Relu', ['a'], ['b'])], [onnx.helper.make_opsetid('', 21)]
    )
    with_function = model(relu)
    with_function.functions.append(function)
    sparse = onnx.helper.make_sparse_tensor(tensor('v', np.ones(1, np.float32)), tensor('i', [0]), [10**9])
    with_sparse = model(relu)
    with_sparse.graph.sparse_initializer.append(sparse)
    in_node = model([('Constant', [], ['c'], dict(sparse_value=sparse)), *relu])
    outside = tensor('w', np.ones(1, np.float32))
    outside.data_location = onnx.TensorProto.EXTERNAL
    outside.external_data.add(key='location', value='/etc/passwd')
    outside.ClearField('raw_data')
    for made, told in (
        (with_function, 'has functions'),
        (with_sparse, 'has sparse constants'),
        (in_node, 'has sparse constants'),
        (model(relu, [outside]), "keeps its weights 'w' in another file"),
        (model([('Constant', [], ['c'], dict(value=outside)), *relu]), "keeps its weights 'w' in another file"),
    ):
        with pytest.raises(PTQError, match=f"model.onnx' {told}, which no export of ours does; export it again"):
            check(made)
