"""Quantized weights as a parametrization: whoever reads ``module.weight`` sees the quantized one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmdet_ptq.quantizers import LearnedRounding, Quantizer
from mmdet_ptq.wrapping.watching.layers import RowLayout


class QuantizedWeight(nn.Module):
    """The parametrization of one weight.

    Inside a forward pass of the whole detector the quantized weight is computed once, however often the layer is
    called (:attr:`caching` is switched by the detector's forward hooks). ``torch.nn.utils.parametrize.cached`` is
    not used for this: its key is the identity of the module that was parametrized first, which a deep copy keeps.

    Args:
        quantizer: Number format, working on rows (out_channels, -1).
        layout: How the weight becomes rows.
    """

    def __init__(self, quantizer: Quantizer, layout: RowLayout) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.layout = layout
        self.rounding: LearnedRounding | None = None  # only while a reconstruction learns it
        self.enabled = True
        self.caching = False
        self._cached: Tensor | None = None
        self._frozen: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        if self._frozen is not None:
            return self._frozen
        if self._cached is not None:
            return self._cached
        quantized = self._quantize(weight)
        if self.caching:
            self._cached = quantized
        return quantized

    def _quantize(self, weight: Tensor) -> Tensor:
        rounding = None if self.rounding is None else self.rounding()
        return self.layout.from_rows(self.quantizer(self.layout.to_rows(weight), rounding), weight.shape)

    def step_size(self) -> float:
        """See :meth:`mmdet_ptq.quantizers.Quantizer.step_size`."""
        return self.quantizer.step_size()

    def step_sizes(self, weight: Tensor) -> Tensor:
        """The quantization step of every element of a weight."""
        rows = self.layout.to_rows(weight.detach())
        return self.layout.from_rows(self.quantizer.step_sizes().reshape(-1, 1).expand_as(rows), weight.shape)

    def learn_rounding(self, weight: Tensor) -> LearnedRounding:
        """Rounds with a learned choice from now on, until :meth:`settle_rounding`."""
        self.rounding = LearnedRounding(self.quantizer, self.layout.to_rows(weight.detach()))
        return self.rounding

    @torch.no_grad()
    def settle_rounding(self, weight: Tensor) -> None:
        """Moves the float weight, in place, to where rounding to the nearest gives the learned codes.

        The weight itself then carries the choice: no other state is stored, and later training starts from it.
        """
        rows = self.layout.to_rows(weight)
        codes = self.quantizer.encode(rows, self.rounding.hard())
        self.rounding = None
        centre = self.quantizer.inside_bin(codes)
        settled = centre
        # as near to the trained value as the bin allows
        for share in (0.45, 0.9):
            nearer = centre + share * (rows - centre)
            settled = torch.where(self.quantizer.encode(nearer) == codes, nearer, settled)
        # a weight's code may depend on its neighbours': chosen one by one they may not fit each other
        astray = (self.quantizer.encode(settled) != codes).any(1, keepdim=True)
        settled = torch.where(astray, centre, settled)
        weight.copy_(self.layout.from_rows(settled, weight.shape))

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Moves a weight, in place, onto the values it is rounded to: later training starts far from every boundary.

        Where the grid rounds such a value to another one the weight stays.
        """
        rows = self.layout.to_rows(weight)
        rounded = self.quantizer(rows)
        kept = self.quantizer(rounded) == rounded
        weight.copy_(self.layout.from_rows(torch.where(kept, rounded, rows), weight.shape))

    def set_caching(self, caching: bool) -> None:
        """Starts or ends a forward pass of the whole detector."""
        self.caching = caching
        self._cached = None

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Integer codes of a weight, rows (out_channels, -1)."""
        return self.quantizer.encode(self.layout.to_rows(weight))

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Computes the quantized weight once; later forwards return it until :meth:`thaw`."""
        self._frozen = self._quantize(weight).detach()

    def fix(self, value: Tensor) -> None:
        """Freezes to a given value, such as the one integer codes stand for."""
        self._frozen = value.detach().clone()

    def thaw(self) -> None:
        """Computes the weight in every forward again, so that gradients flow."""
        self._frozen = None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self._frozen is not None:
            self._frozen = fn(self._frozen)
        return self


def attach_weight(layer: nn.Module, quantizer: Quantizer) -> QuantizedWeight:
    """Quantizes a layer's weight from now on, in place.

    Args:
        layer: Convolution, transposed convolution or linear layer.
        quantizer: Its weight format.
    """
    quantized = QuantizedWeight(quantizer, RowLayout.of(layer))
    # unsafe: the check would run a quantizer whose scale is not known yet
    parametrize.register_parametrization(layer, 'weight', quantized, unsafe=True)
    return quantized


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Layer name to its weight parametrization, for every quantized layer."""
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, 'weight'):
            for candidate in module.parametrizations.weight:
                if isinstance(candidate, QuantizedWeight):
                    found[name] = candidate
    return found


def float_weight(layer: nn.Module) -> nn.Parameter:
    """The float weight behind a quantized one."""
    return layer.parametrizations.weight.original


def freeze_weights(model: nn.Module) -> None:
    """Freezes every quantized weight of the model (for inference)."""
    for name, quantized in quantized_weights(model).items():
        quantized.freeze(float_weight(model.get_submodule(name)))


def thaw_weights(model: nn.Module) -> None:
    """Makes every quantized weight of the model trainable again."""
    for quantized in quantized_weights(model).values():
        quantized.thaw()
