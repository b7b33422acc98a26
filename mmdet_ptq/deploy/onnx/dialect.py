"""What runtimes that read ONNX want differently: which quantizers are written, how, and what the graph becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


@dataclass(frozen=True)
class Dialect:
    """How a runtime's graph is written; the defaults are plain QuantizeLinear and DequantizeLinear.

    Attributes:
        between_layers: Whether quantizers that stand between the layers are written, too.
        clip_codes: Whether codes of fewer than 8 bits are clipped after they are rounded, otherwise values before it.
        unsigned: Whether symmetric activations are written as bytes without sign, see :func:`.nodes.expand_quantizers`.
        rounds_wide: Whether activations of more than 8 bits are rounded, otherwise they stay float.
        slices_into_kernel: Whether a convolution behind SpaceToDepth takes the slices into its kernel.
        passes: What is done to the graph, in this order.
        packings: What is done to its constants behind that, unless they are to stay unpacked.
        compact: Whether names and constants that nobody reads are dropped.
        check: Refuses a finished model that breaks a rule of the runtime.
    """

    between_layers: bool = True
    clip_codes: bool = False
    unsigned: bool = False
    rounds_wide: bool = True
    slices_into_kernel: bool = True
    passes: tuple[Callable[[ir.Graph], Any], ...] = ()
    packings: tuple[Callable[[ir.Graph], Any], ...] = ()
    compact: bool = True
    check: Callable[[onnx.ModelProto], None] | None = None
