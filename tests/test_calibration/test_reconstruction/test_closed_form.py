from types import SimpleNamespace

import pytest
import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from torch import nn

from mmdet_ptq.calibration.reconstruction.closed_form import seen_by as read_and_returned
from mmdet_ptq.calibration.reconstruction.least_squares import by_group, patches


def seen_by(layer, x):
    """What the closed form takes for a layer's input and output in one call of a unit."""
    streams = SimpleNamespace(tensors=lambda inputs: inputs, run=lambda unit, call, inputs, tensors: layer(tensors))
    data = SimpleNamespace(layers=dict(layer=layer), streams=streams, unit=None)
    with torch.no_grad():
        ((read, output),) = read_and_returned(data, 'layer', 0, x)
    assert not layer._forward_hooks
    return read, output


@pytest.mark.parametrize(
    'layer, size',
    [
        (nn.Conv2d(4, 6, 3, padding=1), (2, 2)),
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), (5, 6)),
        # pads in its forward, as TensorFlow does: not what its attribute says
        (Conv2dAdaptivePadding(4, 6, 3), (5, 6)),
        (Conv2dAdaptivePadding(4, 6, 3), (2, 2)),
        (Conv2dAdaptivePadding(4, 4, 3, stride=2, groups=4), (5, 6)),
    ],
    ids=str,
)
def test_weights_times_what_was_read_are_the_output(layer, size):
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    read, output = seen_by(layer, x)
    reads, y = patches(layer, read), by_group(layer, output)
    rows = layer.weight.detach().reshape(len(reads), -1, reads.shape[1])
    again = rows @ reads + layer.bias.detach().view(len(reads), -1, 1)
    assert again.shape == y.shape and torch.allclose(again, y, atol=1e-5)


def test_a_linear_layer_after_a_convolution_is_seen_for_itself():
    layer, convolution = nn.Linear(4, 3), nn.Conv2d(4, 4, 1)
    x = torch.randn(5, 4)

    class Both(nn.Module):
        def forward(self, x):
            convolution(x[:, :, None, None])
            return layer(x)

    streams = SimpleNamespace(tensors=lambda inputs: inputs, run=lambda unit, call, inputs, tensors: Both()(tensors))
    with torch.no_grad():
        ((read, output),) = read_and_returned(
            SimpleNamespace(layers=dict(layer=layer), streams=streams, unit=None), 'layer', 0, x
        )
        assert torch.equal(read, x) and torch.equal(output, layer(x))
