import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mmdet_ptq.wrapping.watching.tensors import deep_copy, gradients_everywhere


def test_modules_that_keep_tensors_of_a_graph_are_copied():
    net = nn.Sequential(prune.l1_unstructured(nn.Conv2d(3, 3, 1), 'weight', 2), nn.ReLU())
    x = torch.randn(1, 3, 4, 4)
    net[1].seen = {'levels': (net(x), net[0].weight)}
    twin = deep_copy(net)
    assert torch.equal(twin(x), net(x)) and twin[1].seen['levels'][0].grad_fn is None
    # the original keeps its graph
    assert net[1].seen['levels'][0].grad_fn is not None and net[0].weight.grad_fn is not None


def test_a_pass_with_gradients_leaves_no_weight_that_cannot_be_copied():
    net = prune.l1_unstructured(nn.Conv2d(3, 3, 1), 'weight', 2).eval().requires_grad_(False)
    with gradients_everywhere(net):
        net(torch.randn(1, 3, 4, 4))
    assert net.weight.grad_fn is None and not net.weight_orig.requires_grad


def test_code_that_knows_no_gradients_writes_constants_into_views():
    """PointRend sets the image's number in the regions of each."""
    net = nn.Linear(4, 5)
    with gradients_everywhere(net):
        rows = net(torch.ones(6, 4))
        first, second = rows.split([2, 4])
        first[:, 0] = 7
        assert rows[:, 0].tolist()[:2] == [7, 7] and first.grad_fn is not None
        with pytest.raises(RuntimeError, match='multiple views'):
            second[:, 0] = net.bias[0]


def test_code_that_knows_no_gradients_reads_arrays():
    net = nn.Linear(4, 5)
    with gradients_everywhere(net):
        out = net(torch.ones(2, 4))
        assert np.asarray(out).shape == out.numpy().shape == (2, 5)
        assert np.asarray(out, dtype=np.float64).dtype == np.float64
        assert out.grad_fn is not None


@pytest.mark.parametrize('size', [(2, 5), (0,)])
def test_code_that_knows_no_gradients_writes_into_tensors(size):
    net = nn.Linear(4, 5)
    place = torch.empty(size)
    with gradients_everywhere(net):
        out = net(torch.ones(2, 4))
        result = torch.mul(out, 2, out=place)
        assert result is place and torch.equal(place, out * 2) and place.grad_fn is not None
        values, indices = torch.empty(2), torch.empty(2, dtype=torch.long)
        largest = torch.max(out, dim=1, out=(values, indices))
    assert torch.equal(values, out.max(1).values) and torch.equal(indices, out.max(1).indices)
    assert torch.equal(largest.indices, indices)
