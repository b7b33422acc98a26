import copy
import sys

import numpy as np
import pytest
import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from torch import nn
from torch.nn import functional

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import SIZE, tiny_detector, tiny_quantized
from mmdet_ptq.wrapping import LayerStructure, Structure, prepare_detector, set_mode

pytest.importorskip('ncnn', reason="needs ncnn: pip install 'mmdet-ptq[ncnn]'")
pytest.importorskip('pnnx', reason="needs pnnx: pip install 'mmdet-ptq[ncnn]'")

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.deploy.ncnn import format as ncnn_format
from mmdet_ptq.deploy.ncnn.export import export_ncnn
from mmdet_ptq.deploy.ncnn.formats import check_ncnn
from mmdet_ptq.deploy.ncnn.layers import is_integer
from mmdet_ptq.deploy.ncnn.network import NcnnNetwork
from mmdet_ptq.deploy.ncnn.runtime import NcnnRuntime
from mmdet_ptq.deploy.ncnn.trace import traceable

MIN_MAX = dict(type='mmdet_ptq.MinMaxObserver')
SYMMETRIC = dict(symmetric=True, narrow_range=True)
W8A8 = dict(preset='w8a8_observe', activations=dict(observer=MIN_MAX, quantizer=SYMMETRIC))
SHIFTED = dict(W8A8, activations=dict(observer=MIN_MAX, quantizer=dict(narrow_range=True, shared_zero_point=True)))
# asymmetric 4-bit activations, log-affine weights, 8-bit ends, per-channel scales with zero points on depthwise inputs
W4A4 = dict(
    weights=dict(bits=4, quantizer=dict(type='mmdet_ptq.LogAffineQuantizer')),
    activations=dict(bits=4, observer=MIN_MAX),
    first=dict(
        weights=dict(bits=8, quantizer=dict(type='mmdet_ptq.AffineQuantizer')),
        activations=dict(bits=8, quantizer=SYMMETRIC),
    ),
)
SHAPE = (1, 3, SIZE, SIZE)
CASES = {
    'ssd': ('ssd', SHIFTED),
    'retinanet': ('retinanet', W8A8),
    'yolox': ('yolox', SHIFTED),
    'ssd-w4a4': ('ssd', W4A4),
}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Case name to detector, structure and exported file; each made once."""
    made = {}

    def make(case):
        if case not in made:
            kind, ptq = CASES[case]
            detector, structure = tiny_quantized(kind, ptq)
            check_ncnn(structure)
            made[case] = detector, structure, export_ncnn(detector, SHAPE, tmp_path_factory.mktemp(case))
        return made[case]

    return make


def image(seed=0):
    # not pixels: their quotients by a scale may end in exactly one half, which ncnn rounds away from zero
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(detector, network, x):
    """The largest difference of an output, against its standard deviation."""
    expected = RawOutputs(detector)(x)
    got = network.run(np.ascontiguousarray(x[0]))
    assert [tuple(ours.shape[1:]) for ours in expected] == [theirs.shape for theirs in got]
    return max(
        float((ours[0] - torch.from_numpy(theirs)).abs().max() / ours.std())
        for ours, theirs in zip(expected, got, strict=True)
    )


def least_difference(detector, network):
    """Of three images: one code that rounds the other way moves an output of the tiny detectors by 1e-2 and more."""
    return min(difference(detector, network, image(seed)) for seed in range(3))


@pytest.mark.parametrize(
    'case',
    [
        case
        if case == 'retinanet'
        else pytest.param(case, marks=[pytest.mark.thorough if case == 'ssd' else pytest.mark.slow])
        for case in CASES
    ],
)
def test_outputs_are_the_simulations(exported, case):
    detector, structure, path = exported(case)
    network = NcnnNetwork(path, packing=False)
    differences = [difference(detector, network, image(seed)) for seed in range(3)]
    assert min(differences) < 1e-4
    assert max(differences) < 0.5
    integer = [layer for layer in network.layers if is_integer(layer)]
    assert len(integer) == sum(len(layer.inputs) for layer in structure.layers if layer.integer)


def test_it_is_the_integers_that_run(exported):
    detector, _, path = exported('retinanet')
    network = NcnnNetwork(path, packing=False)
    assert least_difference(detector, network) < 1e-4
    twin = copy.deepcopy(detector)
    set_mode(twin, 'float')
    assert least_difference(twin, network) > 1e-2


def test_packing_keeps_the_default_close(exported):
    detector, _, path = exported('retinanet')
    assert least_difference(detector, NcnnNetwork(path)) < 1e-4


def test_runtime_takes_batches_and_tells_its_layers(exported):
    detector, structure, path = exported('retinanet')
    runtime = NcnnRuntime(path)
    images = torch.cat([image(1), image(2)])
    both = runtime(images.numpy())
    assert [len(output) for output in both] == [2] * 6
    for ours, theirs in zip(both, runtime(images[1:].numpy()), strict=True):
        np.testing.assert_array_equal(ours[1:], theirs)
    found = runtime.coverage()
    assert not found.float
    assert {call.partition('#')[0] for call in found.integer} == {layer.name for layer in structure.layers}
    assert runtime.meta['input_shape'] == list(SHAPE)


def test_stored_weights_are_the_codes(exported):
    detector, _, path = exported('ssd-w4a4')
    layers = ncnn_format.parse_param(path.read_text())
    ncnn_format.split_weights(layers, path.with_suffix('.bin').read_bytes())
    stored = {layer.name: layer for layer in layers}
    _, calls = traceable(detector)
    log_affine = 0
    for name, call in calls.items():
        codes = call.integers.numpy().astype(np.int8)
        assert stored[name].weights[: 4 + codes.size] == ncnn_format.INT8_TAG + codes.tobytes()
        values = call.integers * call.scale[:, None]
        quantized = detector.get_submodule(call.layer).weight.detach().flatten(1)
        # a location is rounded to the int8 grid of its channel
        torch.testing.assert_close(values, quantized, rtol=0, atol=float(0.51 * call.scale.max()))
        log_affine += len(call.integers.unique()) <= 16 * len(codes) and codes.max() == 127
    assert log_affine > 10


@pytest.mark.parametrize(
    'kind, quantizer, key',
    [
        ('retinanet', dict(symmetric=False), 'all 256 codes.*narrow_range=True'),
        ('retinanet', dict(symmetric=True), 'all 256 codes.*narrow_range=True'),
        ('ssd', dict(narrow_range=True), 'a zero point for each channel.*shared_zero_point=True'),
    ],
)
def test_other_formats_are_refused_before_any_work(kind, quantizer, key, tmp_path):
    ptq = dict(preset='w8a8_observe', activations=dict(observer=MIN_MAX, quantizer=quantizer))
    detector, structure = tiny_quantized(kind, ptq)
    for refuse in (lambda: check_ncnn(structure), lambda: export_ncnn(detector, SHAPE, tmp_path)):
        with pytest.raises(PTQError, match=key) as error:
            refuse()
        assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_weight_with_zero_point_is_refused():
    spec = dict(type='mmdet_ptq.AffineQuantizer', bits=8, symmetric=False)
    with pytest.raises(PTQError, match='ptq.weights.quantizer.symmetric'):
        check_ncnn(Structure(layers=[LayerStructure('conv', 'convolution', 'backbone', 1, 1, spec, ['conv'])]))


@pytest.mark.parametrize('suffix', ['.param', '.bin'])
@pytest.mark.parametrize('content', [lambda data: data[: len(data) // 2], lambda data: b'\x89PNG\r\n' + data, None])
def test_damaged_files_are_refused(exported, tmp_path, suffix, content):
    path = exported('retinanet')[2]
    for part in ('.param', '.bin'):
        data = path.with_suffix(part).read_bytes()
        if part != suffix:
            (tmp_path / f'model{part}').write_bytes(data)
        elif content is not None:
            (tmp_path / f'model{part}').write_bytes(content(data))
    with pytest.raises(PTQError, match=f'model{suffix}'):
        NcnnNetwork(tmp_path / 'model.param')


def test_foreign_param_is_refused(tmp_path):
    (tmp_path / 'model.param').write_text('7767517\n1 1\nInput in0 0 1 in0\n')
    (tmp_path / 'model.bin').write_bytes(b'')
    with pytest.raises(PTQError, match='not exported by mmdet-ptq'):
        NcnnNetwork(tmp_path / 'model.param')


def test_interrupted_export_leaves_nothing_that_looks_complete(exported, tmp_path, monkeypatch):
    detector, _, path = exported('retinanet')
    for part in ('.param', '.bin'):
        (tmp_path / f'model{part}').write_bytes(path.with_suffix(part).read_bytes())

    def interrupted(path, text):
        raise KeyboardInterrupt

    network = ncnn_format.parse_param(path.read_text())
    monkeypatch.setattr(ncnn_format, 'write_text', interrupted)
    with pytest.raises(KeyboardInterrupt):
        ncnn_format.write_network(network, tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == ['model.bin']


def test_missing_package_names_the_extra(monkeypatch, exported):
    detector, _, path = exported('retinanet')
    monkeypatch.setitem(sys.modules, 'ncnn', None)
    with pytest.raises(PTQError, match=r'mmdet-ptq\[ncnn\]'):
        NcnnRuntime(path)


class Assorted(nn.Module):
    """A detector of layers that the tiny ones lack."""

    def __init__(self, **padding):
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 3, padding=1, groups=3)  # two outputs a group
        self.asymmetric = nn.Conv2d(6, 8, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.padded = nn.Conv2d(4, 4, 3, **padding)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)
        self.norm.running_mean.uniform_(-1, 1)

    def data_preprocessor(self, data, training):
        return data

    def forward(self, inputs, data_samples=None, mode='predict'):
        x = functional.relu(self.grouped(inputs))
        x = functional.hardswish(self.asymmetric(x))
        x = functional.relu6(self.norm(self.padded(self.up(x))))
        return [self.linear(x.permute(0, 2, 3, 1)), x[..., ::2, 1::2]]


def assorted(**padding):
    detector = Assorted(**padding).eval()
    batch = torch.randn(2, *SHAPE[1:])
    structure = prepare_detector(detector, PTQConfig.from_dict(W8A8), lambda: detector(batch))
    observe_activations(detector, [dict(inputs=batch)], structure)
    return detector


def test_layers_of_every_kind(tmp_path):
    detector = assorted(padding='same')
    path = export_ncnn(detector, SHAPE, tmp_path)
    network = NcnnNetwork(path, packing=False)
    assert difference(detector, network, image()) < 1e-4
    found = NcnnRuntime(path).coverage()
    assert sorted(found.integer) == ['asymmetric', 'grouped', 'linear']
    assert sorted(found.float) == ['padded', 'up']


class Chain(nn.Module):
    """A detector of layers one after another."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def data_preprocessor(self, data, training):
        return data

    def forward(self, inputs, data_samples=None, mode='predict'):
        return [self.layers(inputs)]


def chain(*layers, size=(SIZE, SIZE), ptq=W8A8):
    detector = Chain(*layers).eval()
    batch = torch.randn(2, 3, *size)
    structure = prepare_detector(detector, PTQConfig.from_dict(ptq), lambda: detector(batch))
    observe_activations(detector, [dict(inputs=batch)], structure)
    return detector


@pytest.mark.parametrize('size', [(31, 40), (32, 32)])
def test_padding_by_the_size_of_the_image(tmp_path, size):
    detector = chain(
        Conv2dAdaptivePadding(3, 4, 3, stride=2),
        nn.ReLU(),
        Conv2dAdaptivePadding(4, 4, (3, 5), stride=2, groups=4),
        nn.ReLU(),
        Conv2dAdaptivePadding(4, 6, 3, dilation=2),
        nn.ReLU(),
        Conv2dAdaptivePadding(6, 2, 2),
        size=size,
    )
    path = export_ncnn(detector, (1, 3, *size), tmp_path)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    assert difference(detector, NcnnNetwork(path, packing=False), x) < 1e-4
    assert not NcnnRuntime(path).coverage().float


def test_the_first_layer_may_work_in_place(tmp_path):
    # 7 bits are bounded by a clip, which works in place; a first layer in float had a network like that, too
    detector = chain(
        nn.Conv2d(3, 4, 3, padding='same'),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        ptq=dict(W8A8, first=dict(activations=dict(bits=7))),
    )
    pixels = np.ascontiguousarray(image()[0])
    before = pixels.copy()
    network = NcnnNetwork(export_ncnn(detector, SHAPE, tmp_path), packing=False)
    assert next(layer.type for layer in network.layers if 'in0' in layer.bottoms) == 'Clip'
    assert difference(detector, network, image()) < 1e-4
    network.run(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_operator_that_means_something_else_is_noticed(tmp_path):
    # pnnx pads with zeros
    with pytest.raises(PTQError, match='an operator means something else'):
        export_ncnn(assorted(padding=1, padding_mode='circular'), SHAPE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_operator_that_ncnn_lacks_is_named(tmp_path, monkeypatch):
    detector, _ = tiny_quantized('retinanet', W8A8)
    kind = type(detector.neck)
    forward = kind.forward
    monkeypatch.setattr(kind, 'forward', lambda self, x: tuple(torch.cumprod(part, 1) for part in forward(self, x)))
    with pytest.raises(PTQError, match='cumprod.*behind neck'):
        export_ncnn(detector, SHAPE, tmp_path)
    assert not list(tmp_path.iterdir())


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2


def test_python_function_that_cannot_be_traced_is_named(tmp_path, monkeypatch):
    detector = tiny_detector('retinanet')
    kind = type(detector.neck)
    forward = kind.forward
    monkeypatch.setattr(kind, 'forward', lambda self, x: tuple(Twice.apply(part) for part in forward(self, x)))
    with pytest.raises(PTQError, match="calls Twice, an autograd function .* leave 'ncnn' out"):
        export_ncnn(detector, (1, 3, 64, 64), tmp_path)


@pytest.mark.parametrize('kind', ['ssd', 'rtmdet'])  # the second one shares layers
def test_a_float_detector_is_exported_to_compare_with(tmp_path, kind):
    detector = tiny_detector(kind)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = list(RawOutputs(detector)(x))
    model = NcnnRuntime(export_ncnn(detector, (1, 3, 64, 64), tmp_path), threads=1)
    for found, wanted in zip(model(x.numpy()), expected, strict=True):
        assert abs(torch.from_numpy(found) - wanted).max() <= 1e-3 * wanted.std()
    assert model.coverage().integer == []
