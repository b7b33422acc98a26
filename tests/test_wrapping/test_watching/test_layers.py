import pytest
import torch
from torch import nn

from mmdet_ptq.wrapping.watching.layers import RowLayout, in_channels, is_depthwise, kind, out_channels


@pytest.mark.parametrize(
    'module, name, x',
    [
        (nn.Conv2d(4, 6, 3), 'convolution', (1, 4, 5, 5)),
        (nn.Conv2d(4, 8, 3, groups=4), 'depthwise convolution', (1, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), 'convolution', (1, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3), 'transposed convolution', (1, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), 'transposed convolution', (1, 4, 5, 5)),
        (nn.Linear(4, 6), 'linear', (1, 4)),
        (nn.Conv1d(4, 6, 3), 'convolution', (1, 4, 5)),
    ],
)
def test_rows_are_output_channels(module, name, x):
    assert kind(module) == name
    layout, x = RowLayout.of(module), torch.randn(x)
    rows = layout.to_rows(module.weight.detach())
    assert rows.shape[0] == out_channels(module)
    assert torch.equal(layout.from_rows(rows, module.weight.shape), module.weight)
    before = module(x)
    for channel in range(rows.shape[0]):
        changed = rows.clone()
        changed[channel] += 1
        with torch.no_grad():
            saved = module.weight.clone()
            module.weight.copy_(layout.from_rows(changed, module.weight.shape))
            different = (module(x) - before).abs().transpose(0, 1 if x.ndim > 2 else -1).flatten(1).amax(1) > 1e-6
            module.weight.copy_(saved)
        assert different.nonzero().flatten().tolist() == [channel]


def test_a_single_input_channel_is_no_depthwise_convolution():
    assert not is_depthwise(nn.Conv2d(1, 4, 3))
    assert is_depthwise(nn.Conv2d(4, 4, 3, groups=4))
    assert in_channels(nn.Linear(3, 5)) == in_channels(nn.Conv2d(3, 5, 1)) == 3
