"""Sizes of a model's tensors before OpenVINO compiles it."""

import numpy as np
import pytest

from mmdet_ptq.deploy.openvino.memory import check_openvino_memory
from mmdet_ptq.errors import PTQError

openvino = pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
ops = pytest.importorskip('openvino.opset15')
META = dict(input_shape=[1, 3, 8, 8])


@pytest.fixture
def check(tmp_path):
    path = tmp_path / 'model.xml'
    path.with_suffix('.bin').write_bytes(bytes(100))

    def run(result, x, meta=META):
        return check_openvino_memory(path, openvino.Model([result], [x]), meta)

    return run


def image(*shape):
    return ops.parameter(openvino.PartialShape(list(shape)), np.float32, name='x')


def test_a_network_of_the_size_of_its_images_is_taken(check):
    x = image(1, 3, 8, 8)
    assert check(ops.relu(ops.add(x, np.float32(1))), x) is True


def test_what_a_model_leaves_open_is_what_the_meta_tells(check):
    x = image(-1, 3, -1, -1)
    # the square of the positions
    flat = ops.reshape(x, np.array([1, -1]), False)
    product = ops.matmul(flat, flat, True, False)
    assert check(product, x) is True
    assert x.get_partial_shape().is_dynamic  # the model stays as it was
    with pytest.raises(PTQError, match=r"model.xml' takes .* GiB of memory .* alone"):
        check(product, x, dict(input_shape=[1, 3, 256, 256]))


def test_a_tensor_that_no_image_explains_is_refused(check):
    x = image(1, 3, 8, 8)
    huge = ops.broadcast(ops.reduce_sum(x, np.array([0, 1, 2, 3]), True), np.array([1000, 1000, 1000, 1]))
    huge.set_friendly_name('huge')
    with pytest.raises(PTQError, match=r"takes 3\.7 GiB of memory .* for 'huge:0 .*' \(Broadcast\) alone"):
        check(ops.reduce_sum(huge, np.array([0]), True), x)


def test_sizes_that_only_a_run_tells_are_said_to_be_unknown(check):
    x = image(1, 3, 8, 8)
    # at most as many places as values: they are counted, and the bound is known
    assert check(ops.non_zero(x, 'i64'), x) is True
    x = image(1, 3, 8, 8)
    size = ops.convert(ops.reduce_sum(x, np.array([0, 1, 2, 3]), False), np.int64)
    assert check(ops.range(np.int64(0), size, np.int64(1), 'i64'), x) is False
    # images that the model does not take
    x = image(-1, -1, -1, -1)
    weight = ops.constant(np.ones((2, 4, 1, 1), np.float32))
    assert check(ops.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1]), x) is False
