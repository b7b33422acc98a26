import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy.agreement import compare_layer_inputs
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.quantizers import AffineQuantizer
from mmdet_ptq.wrapping import prepare_detector

pytest.importorskip('ncnn', reason="needs ncnn: pip install 'mmdet-ptq[ncnn]'")
pytest.importorskip('pnnx', reason="needs pnnx: pip install 'mmdet-ptq[ncnn]'")

from mmdet_ptq.deploy.ncnn.export import export_ncnn
from mmdet_ptq.deploy.ncnn.layer_inputs import ncnn_inputs
from mmdet_ptq.deploy.ncnn.layers import INT8_CONVOLUTIONS
from mmdet_ptq.deploy.ncnn.network import NcnnNetwork
from mmdet_ptq.deploy.ncnn.runtime import NcnnRuntime
from mmdet_ptq.deploy.ncnn.shifts import Shift, shift_of
from mmdet_ptq.deploy.ncnn.trace import traceable

SHAPE = (1, 3, 33, 40)
PTQ = dict(
    preset='w8a8_observe',
    activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver'), quantizer=NcnnRuntime.needed_activations(8)),
)


class Shifted(nn.Module):
    """A detector whose layers read what is nearly all positive, or negative, on every way that ncnn's files have."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16)
        self.left = nn.Conv2d(16, 16, 1)
        self.right = nn.Conv2d(16, 8, 3, padding=1)
        self.grouped = nn.Conv2d(16, 8, 3, padding=1, groups=4)
        self.below = nn.Conv2d(8, 8, 3, padding=2)
        self.behind = nn.Conv2d(16, 16, 3, padding=1)
        self.linear = nn.Linear(16, 5)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def data_preprocessor(self, data, training):
        return data

    def forward(self, inputs, data_samples=None, mode='predict'):
        x = functional.silu(self.depthwise(functional.silu(self.stem(inputs))))
        clipped = functional.relu(self.right(x))
        rows = functional.relu6(self.behind(self.left(x))).permute(0, 2, 3, 1)
        below = self.below(-functional.relu(self.grouped(x)))
        return [self.linear(rows), self.up(clipped), below]


def image(seed):
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 0.3


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    torch.manual_seed(0)
    detector = Shifted().eval()
    batch = torch.cat([image(10), image(11)])
    structure = prepare_detector(detector, PTQConfig.from_dict(PTQ), lambda: detector(batch))
    observe_activations(detector, [dict(inputs=batch)], structure)
    return detector, structure, export_ncnn(detector, SHAPE, tmp_path_factory.mktemp('shifted'))


def worst(detector, network, seed):
    with torch.no_grad():
        expected = RawOutputs(detector)(image(seed))
    return max(
        float((ours[0] - torch.from_numpy(theirs)).abs().max() / ours.std())
        for ours, theirs in zip(expected, network.run(image(seed)[0].numpy()), strict=True)
    )


def test_shifted_layers_give_what_the_simulation_gives(exported):
    detector, _, path = exported
    network = NcnnNetwork(path, packing=False)
    differences = [worst(detector, network, seed) for seed in range(4)]
    assert min(differences) < 1e-5  # one code that rounds the other way gives more
    assert max(differences) < 0.03
    found = compare_layer_inputs(detector, ncnn_inputs(path, image(0)), image(0), follow=True)
    assert len(found) == 9
    assert min(entry.identical for entry in found) > 0.999 and max(entry.largest for entry in found) <= 1
    # a weight of -128, which has no negative, is among those that multiply negated tensors
    assert any(call.integers is not None and call.integers.min() == -128 for call in traceable(detector)[1].values())


def test_packed_layers_pad_with_the_code_of_zero(exported):
    # a wrong border would be of another size
    detector, _, path = exported
    network = NcnnNetwork(path)
    assert max(worst(detector, network, seed) for seed in range(4)) < 0.03


def test_the_code_of_zero_is_the_padding_and_never_negative(exported):
    detector, structure, path = exported
    network = NcnnNetwork(path)
    read = {layer.name: detector.ptq.activations[layer.inputs[0]] for layer in structure.layers}
    names = {call: name for name, call in network.meta['layers'].items()}
    layers = {layer.name: layer for layer in network.layers}
    assert {layers[name].type for name in names.values()} >= {*INT8_CONVOLUTIONS, 'InnerProduct'}
    for layer in ('stem', 'depthwise', 'right', 'grouped', 'below', 'behind'):
        zero = int(read[layer].zero_point.flatten()[0])
        assert float(layers[names[layer]].params[18]) == abs(zero - 128) > 0
    signs = {call: network.meta['shifts'][name][0] for call, name in names.items() if name in network.meta['shifts']}
    assert signs['right'] == -1 and signs['below'] == 1


def test_a_shift_is_shared_or_costs_nothing(exported):
    network = NcnnNetwork(exported[2])
    shifts = [
        network.meta['layers'][layer.name.removeprefix('shifts_')]
        for layer in network.layers
        if layer.name.startswith('shifts_') and layer.type == 'BinaryOp'
    ]
    # right, left and grouped read one tensor; behind a convolution without an activation function, a ReLU or a ReLU6
    # that convolution writes it shifted
    assert sorted(shifts) == ['below', 'linear', 'right', 'stem']


def test_models_of_before_have_no_shifts(exported, tmp_path):
    detector, _, path = exported
    text, meta = path.read_text().rsplit('# ', 1)
    meta = {key: value for key, value in json.loads(meta).items() if key not in ('shifts', 'checksum')}
    (tmp_path / 'model.param').write_text(f'{text}# {json.dumps(meta)}\n')
    (tmp_path / 'model.bin').write_bytes(path.with_suffix('.bin').read_bytes())
    x = image(0).numpy()
    for ours, theirs in zip(NcnnRuntime(path)(x), NcnnRuntime(tmp_path / 'model.param')(x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert ncnn_inputs(tmp_path / 'model.param', image(0)).keys() == ncnn_inputs(path, image(0)).keys()


@pytest.mark.parametrize(
    'zero, bits, symmetric, wanted',
    [
        (1, 8, False, Shift(-1, 127)),
        (127, 8, False, Shift(-1, 1)),
        (128, 8, False, Shift()),
        (129, 8, False, Shift(1, 1)),
        (255, 8, False, Shift(1, 127)),
        (0, 8, True, Shift()),
        (0, 7, False, Shift()),
        (127, 7, False, Shift()),
        (32768, 16, False, Shift()),
    ],
)
def test_what_has_no_code_of_ncnn_is_shifted(zero, bits, symmetric, wanted):
    quantizer = AffineQuantizer(bits, symmetric=symmetric, narrow_range=bits == 8)
    quantizer.zero_point.fill_(zero)
    assert shift_of(quantizer) == wanted and bool(wanted) == (wanted.zero != 0)
