"""What integer kernels write, against whole numbers in NumPy: scales are powers of two, so that nothing else rounds."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mmdet_ptq.deploy.integers.kernels import (
    Average,
    Call,
    ConvolutionSum,
    GemmSum,
    HardSigmoid,
    IntegerKernel,
    Product,
    Sum,
    by_table,
    fits_byte,
    is_kernel_format,
    sigmoid,
)
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer


def quantizer(scale, zero=0, symmetric=False, bits=8, channels=None, axis=1):
    built = AffineQuantizer(bits, symmetric, channels, axis)
    with torch.no_grad():
        built.scale.copy_(torch.as_tensor(scale))
        built.zero_point.copy_(torch.as_tensor(zero))
    return built


def codes(format, *shape):
    first, last = format.code_range
    return torch.randint(first, last + 1, shape, dtype=torch.int32)


def written(exact, output):
    """Values of what a kernel rounds; zero points are added before, which decides ties."""
    zero = output.zero_point.item() + (128 if output.symmetric else 0)
    first, last = output.code_range
    steps = np.rint(exact / output.scale.item() + zero) - zero
    return output.scale.item() * (np.clip(steps + output.zero_point.item(), first, last) - output.zero_point.item())


def test_kernels_know_bytes_with_one_zero_point():
    per_channel = quantizer([0.5, 0.25], 3, channels=2)
    for format in (quantizer(0.5), quantizer(0.5, bits=4), quantizer(0.5, symmetric=True), per_channel):
        assert is_kernel_format(format)
    mixed = quantizer([0.5, 0.25], [3, 4], channels=2)
    assert fits_byte(mixed) and not is_kernel_format(mixed)
    for format in (quantizer(0.5, bits=16), quantizer([1.0, 2.0], channels=2, axis=0), LogAffineQuantizer()):
        assert not fits_byte(format) and not is_kernel_format(format)


@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize(('kind', 'combine', 'scale'), [(Sum, np.add, 1.0), (Product, np.multiply, 64.0)])
def test_two_tensors_are_combined_exactly_and_rounded_once(symmetric, kind, combine, scale):
    zeros = (0, 0, 0) if symmetric else (7, 130, 101)
    a, b, output = (quantizer(s, z, symmetric) for s, z in zip((0.5, 0.25, scale), zeros, strict=True))
    x, y = codes(a, 2, 3, 50), codes(b, 2, 3, 50)
    exact = combine(a.decode(x).detach().double().numpy(), b.decode(y).detach().double().numpy())
    np.testing.assert_array_equal(kind(x, y, (a, b)).value(output), written(exact, output))
    # of formats that kernels do not write, nothing is told
    for other in (quantizer([1.0] * 3, channels=3), quantizer(1.0, bits=16)):
        assert kind(x, y, (a, b)).value(other) is None


def test_an_average_is_an_exact_sum_times_one_factor():
    source, output = quantizer(0.5, 100), quantizer(0.0625, 120)
    x = codes(source, 2, 3, 4, 8)
    mean = source.decode(x).detach().double().numpy().mean((2, 3), keepdims=True)
    found = Average(x, source).value(output).numpy()
    assert found.shape == (2, 3, 1, 1)
    np.testing.assert_array_equal(found, np.clip(np.rint(mean / 0.0625), -120, 135) * 0.0625)


def test_a_hard_sigmoid_is_one_where_the_gate_has_all_its_codes():
    source = quantizer(0.0625, 128)
    x = torch.arange(256, dtype=torch.int32).view(1, 1, 16, 16)
    gate = quantizer(1 / 255)
    exact = functional.hardsigmoid(source.decode(x).detach())
    assert (HardSigmoid(x, source).value(gate) - exact).abs().max() <= 0.501 / 255
    for other in (quantizer(1 / 254), quantizer(1 / 255, 1), quantizer(1 / 15, bits=4)):
        assert HardSigmoid(x, source).value(other) is None


def test_a_relu_clips_codes_where_the_quantizer_ends_elsewhere():
    format = quantizer(0.5, 128)
    x, zero = torch.arange(256, dtype=torch.int32).view(1, 2, 8, 16), torch.full((1, 2, 8, 16), 128, dtype=torch.int32)
    plain = format.decode(x).detach()

    def found(output, *ends):
        return Sum(x, zero, (format, format), ends=list(ends)).value(output)

    assert torch.equal(found(format), plain)
    assert torch.equal(found(format, torch.inf), plain.relu())
    assert torch.equal(found(format, torch.inf, 6), plain.clamp(0, 6))
    # where the codes end there is nothing to clip
    until_six = quantizer(6 / 255)
    assert found(until_six, 6).max().item() == pytest.approx(6)
    total = IntegerKernel(nn.Conv2d(2, 2, 1, bias=False), torch.eye(2).view(2, 2, 1, 1), torch.ones(2))
    summed = total.sum(Call.of(functional.conv2d, plain, total.integers), format)
    # one end for all channels: where their codes end anyway, or at one code
    for scales, zero, told in (([0.5, 0.5], 0, True), ([0.5, 0.25], 0, False), ([6 / 127, 3 / 127], 128, True)):
        output = quantizer(scales, zero, channels=2)
        assert (ConvolutionSum(total, summed, format, ends=[6]).value(output) is not None) is told


@pytest.mark.parametrize('wide', [False, True])
def test_sums_are_exact_however_large_they_grow(wide):
    source = quantizer(0.5, 255)
    channels = 2000 if wide else 8
    integers = torch.full((3, channels, 1, 1), 127.0)
    integers[1] = torch.randint(-127, 128, (channels, 1, 1))
    x = codes(source, 1, channels, 2, 2)
    x[..., 0, 0] = 0
    exact = np.einsum('oc,nchw->nohw', integers[..., 0, 0].long().numpy(), x.long().numpy() - 255)
    conv = IntegerKernel(nn.Conv2d(channels, 3, 1), integers, torch.ones(3))
    found = conv.sum(Call.of(functional.conv2d, source.decode(x).detach(), integers), source)
    np.testing.assert_array_equal(found.double(), exact)
    assert not wide or abs(exact).max() > 2**24
    # the channels of a linear layer lie on its last axis
    rows = source.decode(x).detach().permute(0, 2, 3, 1)
    linear = IntegerKernel(nn.Linear(channels, 3), integers[..., 0, 0], torch.ones(3))
    found = linear.sum(Call.of(functional.linear, rows, linear.integers), source)
    np.testing.assert_array_equal(found.permute(0, 3, 1, 2).double(), exact)
    assert linear.sums.tolist() == integers.sum((1, 2, 3)).tolist()


def test_a_bias_is_added_on_the_grid_of_the_sums():
    source, output = quantizer(0.5, 10), quantizer(4.0, 20)
    integers, scale = torch.randint(-127, 128, (3, 5)).float(), torch.tensor([0.25, 0.5, 1.0])
    layer = nn.Linear(5, 3)
    kernel = IntegerKernel(layer, integers, scale)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, -2.25, 3.5]))
    x = source.decode(codes(source, 7, 5)).detach()
    total = kernel.sum(Call.of(functional.linear, x, layer.weight), source)
    exact = x.double().numpy() @ (integers * scale[:, None]).double().numpy().T + layer.bias.detach().double().numpy()
    result = GemmSum(kernel, total, source)
    np.testing.assert_array_equal(result.float_value(), exact)
    assert result.has_integer_bias()
    # -2.25 is no multiple of 0.5 * 1: it would be rounded
    kernel = IntegerKernel(layer, integers, torch.tensor([0.25, 1.0, 1.0]))
    assert not GemmSum(kernel, total, source).has_integer_bias()
    on_grid = np.clip(np.rint(exact / 4.0), -20, 235) * 4.0
    np.testing.assert_array_equal(
        ConvolutionSum(IntegerKernel(layer, integers, scale), total, source).value(output), on_grid
    )
    with torch.no_grad():
        layer.bias.fill_(2.0**31)
    assert ConvolutionSum(IntegerKernel(layer, integers, scale), total, source).value(output) is None


def test_a_function_is_looked_up_for_each_code_of_each_channel():
    x = torch.linspace(-40, 40, 2001)
    assert (sigmoid(x) - x.double().sigmoid()).abs().max() < 3e-7
    assert torch.equal(sigmoid(x[:500]).unique(), sigmoid(x[:1])) and 0 <= sigmoid(x).min() and sigmoid(x).max() <= 1
    for format in (
        quantizer(0.5, 3),
        quantizer([0.5, 2.0, 0.125], [3, 0, 9], channels=3),
        quantizer(0.5, symmetric=True),
    ):
        values = format.decode(codes(format, 2, 3, 4, 4)).detach()
        calls = []
        found = by_table(lambda x, calls=calls: calls.append(x.numel()) or x.exp(), values, format)
        assert torch.equal(found, values.exp()) and calls == [256 * (format.num_channels or 1)]
