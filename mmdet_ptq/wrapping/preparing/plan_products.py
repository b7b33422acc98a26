"""Products of two activations, as in attention: both factors are quantized where the product reads them."""

from __future__ import annotations

from collections import defaultdict

from mmengine.logging import print_log

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.quantizers import build_quantizer
from mmdet_ptq.wrapping.flow import Product
from mmdet_ptq.wrapping.names import factor_name
from mmdet_ptq.wrapping.preparing.dataflow_graph import DataflowGraph
from mmdet_ptq.wrapping.structure import ActivationStructure, Structure
from mmdet_ptq.wrapping.watching.channel_costs import BITS

# of the right factor
SAFE_BITS = 7


def plan_products(structure: Structure, graph: DataflowGraph, cfg: PTQConfig, calls: dict[str, int]) -> None:
    """Adds quantizers for the factors of products to a structure that is about to be applied.

    A factor has one scale, and no zero point: OpenVINO multiplies matrices with one in float. A left factor that is
    never negative, as the weights of attention, has codes without sign where the format of activations knows them.
    With ``saturation='safe'`` right factors have 7 bits: processors without VNNI add two products of a byte and a
    signed byte in 16 bits, and 2 * 255 * 64 is the most that fits.

    Args:
        structure: The detector's structure with quantized weights and inputs, changed in place.
        graph: Its float pass.
        cfg: The ``ptq`` block.
        calls: How often each module runs in a pass.
    """
    policy = cfg.activations
    for op in graph.products:
        module, call, function, index = op.place
        told = call if calls[module] > 1 else None
        names = [factor_name(module, function, index, side, told) for side in ('left', 'right')]
        unsigned = graph.is_positive(op.inputs[0]) and not policy.quantizer.get('symmetric', False)
        bits = graph.product_bits(op)
        for name, symmetric in zip(names, (not unsigned, True), strict=True):
            spec = dict(
                type='mmdet_ptq.AffineQuantizer',
                bits=SAFE_BITS if cfg.saturation == 'safe' and name == names[1] and bits == BITS else bits,
                symmetric=symmetric,
                # without a sign it would move the zero point
                narrow_range=symmetric and bool(policy.quantizer.get('narrow_range', False)),
            )
            structure.activations[name] = ActivationStructure(build_quantizer(spec).spec(), 1, policy.observer)
        structure.products.append(Product(*op.place, names, op.macs).to_dict())
    _take_from_uncovered(structure, graph)
    if structure.products:
        print_log(f'{len(structure.products)} products of two activations are quantized', 'current')


def _take_from_uncovered(structure: Structure, graph: DataflowGraph) -> None:
    """What is quantized is no longer told as float: both passes saw the same calls of a function in a module."""
    quantized: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for op in graph.operations:
        if op.macs:
            quantized[op.place[0], op.name].append(op in graph.products)
    structure.uncovered = [
        uncovered
        for uncovered in structure.uncovered
        if not (calls := quantized[uncovered['module'], uncovered['operation']]) or not calls.pop(0)
    ]
