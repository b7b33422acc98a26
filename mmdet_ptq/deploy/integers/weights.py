"""A quantized weight as what integer kernels take: int8 values and one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdet_ptq.quantizers import LogAffineQuantizer, Quantizer

INT8_MAX = 127


@dataclass
class IntegerWeight:
    """Weight = values * scale, exactly.

    Attributes:
        codes: What the checkpoint stores, rows (C, K), 0 to 2^bits - 1 above ``lowest``, torch.int32.
        lowest: The lowest code.
        bits: Bits of a stored code.
        levels: What each code stands for, in units of the scale: one row for the whole layer (1, 2^bits), or one per
            channel (C, 2^bits), torch.int32.
        scale: One per channel, (C,), float32; for a per-tensor format the same number C times.
    """

    codes: Tensor
    lowest: int
    bits: int
    levels: Tensor
    scale: Tensor

    @property
    def fits_int8(self) -> bool:
        """Whether every value fits an int8."""
        return int(self.levels.min()) >= -INT8_MAX - 1 and int(self.levels.max()) <= INT8_MAX

    def integers(self) -> Tensor:
        """The values in units of the scale, rows (C, K), torch.int32."""
        index = (self.codes - self.lowest).long()
        return torch.gather(self.levels.expand(len(index), -1), 1, index)

    def values(self) -> Tensor:
        """The weight, rows (C, K), float32."""
        return self.integers().float().mul_(self.scale.reshape(-1, 1))


def integer_weight(
    quantizer: Quantizer, codes: Tensor, levels: Tensor | None = None, level_scale: Tensor | None = None
) -> IntegerWeight:
    """Brings the codes of a weight to integers and a scale per channel.

    Args:
        quantizer: The weight's format.
        codes: Integer codes, rows (C, K).
        levels: The stored levels of a log-affine format: logarithms may round differently on another machine.
            Defaults to None: the quantizer's own.
        level_scale: Their stored scale. Defaults to None: the quantizer's own.
    """
    low, high = quantizer.code_range
    if isinstance(quantizer, LogAffineQuantizer):
        if levels is None:
            levels, level_scale = quantizer.integer_levels()
        levels, scale = levels.to(torch.int32), level_scale
    else:
        points = quantizer.zero_point.reshape(-1, 1)
        levels = torch.arange(low, high + 1, dtype=torch.int32, device=points.device)[None] - points
        scale = integer_scale(quantizer)
    return IntegerWeight(codes, low, max(1, (high - low).bit_length()), levels, scale.expand(len(codes)).clone())


def integer_scale(quantizer: Quantizer) -> Tensor:
    """What the integers of a weight are multiples of, one per output channel or one for all, (C,) or (1,)."""
    if isinstance(quantizer, LogAffineQuantizer):
        return quantizer.integer_levels()[1]
    return quantizer.positive_scale().detach().reshape(-1)
