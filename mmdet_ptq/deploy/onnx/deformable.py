"""mmcv's deformable convolutions as ONNX's DeformConv, while a detector is exported.

mmcv calls a compiled operator, which computes nothing on the tensors that an exporter traces with. The layouts of
offsets, masks and weights are the same in both, and so is what lies outside the image: zero. No runtime computes it in
integers: the weight stays float, and the coverage table names the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mmcv.ops.deform_conv import DeformConv2dFunction
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
from torch import Tensor
from torch.nn.modules.utils import _pair


@contextmanager
def deformable_nodes() -> Iterator[None]:
    """While it lasts, deformable convolutions write a DeformConv node when a detector is exported."""
    kept = DeformConv2dFunction.forward, ModulatedDeformConv2dFunction.forward
    DeformConv2dFunction.forward = staticmethod(_plain)
    ModulatedDeformConv2dFunction.forward = staticmethod(_modulated)
    try:
        yield
    finally:
        DeformConv2dFunction.forward, ModulatedDeformConv2dFunction.forward = map(staticmethod, kept)


def _plain(
    ctx,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    return _node((input, weight, offset), stride, padding, dilation, groups, deform_groups)


def _modulated(
    ctx,
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return _node((input, weight, offset, bias, mask), stride, padding, dilation, groups, deform_groups)


def _node(inputs: Sequence[Tensor], stride, padding, dilation, groups: int, deform_groups: int) -> Tensor:
    source, weight = inputs[:2]
    ends = zip(source.shape[2:], weight.shape[2:], _pair(stride), _pair(padding), _pair(dilation), strict=True)
    size = tuple((have + 2 * pad - apart * (kernel - 1) - 1) // step + 1 for have, kernel, step, pad, apart in ends)
    inputs = [*inputs[:2], *(value if value.dim() == 1 else _as_read(value, size) for value in inputs[2:])]
    attributes = dict(
        strides=_pair(stride),
        pads=_pair(padding) * 2,
        dilations=_pair(dilation),
        group=groups,
        offset_group=deform_groups,
        kernel_shape=tuple(weight.shape[2:]),
    )
    return torch.onnx.ops.symbolic(
        'DeformConv',
        inputs,
        attrs={key: list(value) if isinstance(value, tuple) else value for key, value in attributes.items()},
        dtype=source.dtype,
        shape=(source.shape[0], weight.shape[0], *size),
        version=19,
    )


def _as_read(value: Tensor, size: tuple[int, int]) -> Tensor:
    """Offsets or masks as mmcv's kernel reads them: one value after the other, whatever size they were computed for.

    DyHead computes them for another level of its pyramid than it convolves.
    """
    if value.shape[2:] == size:
        return value
    return value.flatten(1)[:, : value.shape[1] * size[0] * size[1]].reshape(-1, value.shape[1], *size)
