import pytest
import torch
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import get_runtime, model_bytes, open_model, settle_biases
from mmdet_ptq.deploy.agreement import compare_layer_inputs
from mmdet_ptq.deploy.openvino import runtime as module
from mmdet_ptq.deploy.openvino.layer_inputs import openvino_inputs
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import freeze_weights, prepare_detector
from mmdet_ptq.wrapping.state import only_read_tensors

openvino = pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[openvino]'")
SHAPE = (1, 3, 64, 64)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp('openvino')
    get_runtime('openvino').export(tiny_detector('retinanet'), found, SHAPE)
    return found


def test_an_operation_that_it_does_not_convert_is_one_sentence(tmp_path):
    detector = tiny_detector('retinanet')
    convolution = detector.neck.fpn_convs[0].conv
    convolution.padding_mode, convolution._reversed_padding_repeated_twice = 'circular', [1] * 4
    with pytest.raises(
        PTQError, match=r'cannot convert the detector: .*padding mode: \[wrap\]; replace that'
    ) as caught:
        get_runtime('openvino').export(detector, tmp_path, SHAPE)
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())


class _Behind(nn.Module):
    """A convolution and what is computed of its output."""

    def __init__(self, convolution, function):
        super().__init__()
        self.convolution, self.function = convolution, function

    def forward(self, x):
        return self.function(self.convolution(x))


@pytest.mark.parametrize(
    'function',
    [
        lambda y: torch.relu(-y),
        lambda y: 1 - y,
        lambda y: y / torch.linspace(1, 3, y.shape[1]).view(-1, 1, 1),
        lambda y: y * (torch.arange(y.shape[1]) > 2).view(-1, 1, 1),
    ],
    ids=['negative', 'rest', 'divided', 'some channels'],
)
def test_arithmetic_behind_a_shared_convolution_leaves_it_in_integers(function, tmp_path):
    detector = tiny_detector('retinanet')
    convs = detector.bbox_head.cls_convs
    convs[0].with_activation = False
    convs[0] = _Behind(convs[0], function)
    structure = prepare_detector(detector, PTQConfig.from_dict(OBSERVE), lambda: predict(detector, tiny_batch(1)))
    observe_activations(detector, [tiny_batch(2, seed=1)], structure)
    settle_biases(detector, structure)
    freeze_weights(detector)
    path = get_runtime('openvino').export(detector, tmp_path, SHAPE)
    assert not open_model(path).coverage().float
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    found = compare_layer_inputs(detector, openvino_inputs(path, image), image, follow=True, within=only_read_tensors)
    assert min(entry.identical for entry in found) > 0.99


@pytest.mark.thorough
def test_an_export_that_is_killed_leaves_no_mixture(folder, tmp_path, monkeypatch):
    for name in ('model.xml', 'model.bin'):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    write = module.write_atomic

    def killed(path, content):
        write(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'write_atomic', killed)
    with pytest.raises(KeyboardInterrupt):
        get_runtime('openvino').export(tiny_detector('retinanet', seed=1), tmp_path, SHAPE)
    assert [path.name for path in tmp_path.iterdir()] == ['model.bin']


@pytest.mark.thorough
def test_a_signal_does_not_end_the_process_once_models_are_gone(folder, on_processor):
    """As of a worker of a data loader that ends; see ``shared_core``."""
    code = """
import gc, os, signal, sys
from mmdet_ptq.deploy import open_model
first, second = open_model(sys.argv[1]), open_model(sys.argv[1])
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print('handled'))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    assert on_processor('here', code, str(folder / 'model.xml')).split() == ['handled']


def test_only_its_own_files_count(folder):
    path = folder / 'model.xml'
    expected = path.stat().st_size + (folder / 'model.bin').stat().st_size
    (folder / 'model.onnx').write_bytes(bytes(1000))
    assert model_bytes(path) == expected


def test_a_foreign_model_is_told_from_a_damaged_one(tmp_path):
    path = tmp_path / 'model.xml'
    openvino.save_model(openvino.convert_model(torch.nn.Conv2d(3, 4, 3), example_input=torch.zeros(1, 3, 8, 8)), path)
    with pytest.raises(PTQError, match='was not exported by mmdet-ptq'):
        open_model(path)
    path.write_text('no xml')
    with pytest.raises(PTQError, match='is damaged or no OpenVINO model'):
        open_model(path)
