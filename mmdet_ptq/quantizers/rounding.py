"""Learned rounding: whether each weight goes to the code below it or to the one above."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdet_ptq.quantizers.base import Quantizer

# the stretched sigmoid of AdaRound reaches 0 and 1 with a finite argument
ZETA, GAMMA = 1.1, -0.1


class LearnedRounding(nn.Module):
    """Relaxed rounding h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1) of AdaRound (Nagel et al., ICML 2020).

    It starts where h(V) is the weight's own place between its two codes, so the relaxed weight is the float one. In a
    log-affine quantizer the codes, and so the rounding, live in the logarithmic domain.

    Args:
        quantizer: The fitted weight quantizer.
        rows: The weight, shape (C, K).
    """

    def __init__(self, quantizer: Quantizer, rows: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            position = quantizer.code_position(rows)
            rest = (position - position.floor()).clamp(0, 1)
            start = -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)
        self.v = nn.Parameter(start)

    def forward(self) -> Tensor:
        """h(V), of the weight's shape."""
        return torch.clamp(torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def regularizer(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^beta, which vanishes where every weight has chosen (AdaRound, eq. 24)."""
        return (1 - (2 * self() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The choice: 1 where the code above is taken, else 0."""
        return (self.v >= 0).to(self.v.dtype)
