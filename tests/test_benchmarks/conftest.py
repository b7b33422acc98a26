"""A tiny detector and what other tools start from."""

import pytest
from benchmark_tools import SHAPE

from mmdet_ptq.deploy import export_onnx, get_runtime
from mmdet_ptq.testing import tiny_batch, tiny_config, tiny_detector


@pytest.fixture(scope='module')
def detector():
    return tiny_detector('retinanet')


@pytest.fixture(scope='module')
def images(detector):
    inputs = detector.data_preprocessor(tiny_batch(6), False)['inputs']
    return [inputs[i : i + 1].numpy() for i in range(len(inputs))]


@pytest.fixture(scope='module')
def float_onnx(detector, tmp_path_factory):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    path = tmp_path_factory.mktemp('float') / 'model.onnx'
    export_onnx(detector, path, SHAPE)
    return path


@pytest.fixture(scope='module')
def float_openvino(detector, tmp_path_factory):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    return get_runtime('openvino').export(detector, tmp_path_factory.mktemp('float'), SHAPE)


@pytest.fixture
def config(tmp_path):
    cfg = tiny_config('retinanet', tmp_path)
    path = tmp_path / 'tiny.py'
    cfg.dump(path)
    return path
