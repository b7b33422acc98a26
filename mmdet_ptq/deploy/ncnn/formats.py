"""What ncnn's int8 layers can compute, told from a detector's structure before any long work."""

from __future__ import annotations

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers.selection import build_quantizer
from mmdet_ptq.wrapping import Structure

INT8_MAX = 127


def check_ncnn(structure: Structure) -> None:
    """Refuses number formats that ncnn's int8 layers do not have.

    They multiply codes of -127 .. 127 without zero point. An activation fits if it has no more codes than that: one
    with a zero point is shifted (:mod:`mmdet_ptq.deploy.ncnn.shifts`). What is quantized between the layers is left out
    there.

    Args:
        structure: The quantized detector's structure.

    Raises:
        PTQError: A format does not fit; the sentence names the key to set.
    """
    divided = next((name for name, entry in structure.activations.items() if entry.divided), None)
    if divided is not None:
        raise PTQError(
            f"the channels of the activation {divided} are divided before they are quantized, and ncnn's "
            'layers quantize what they read by one scale; set `ptq.activations.scale_migration=0`, and '
            'calibrate again.'
        )
    read = {name for layer in structure.layers for name in layer.inputs}
    for name, entry in structure.activations.items():
        if name in read:
            check_activation(name, entry.spec)
    for layer in structure.layers:
        if layer.weight and layer.weight['bits'] == 8 and build_quantizer(layer.weight).has_zero_point:
            raise PTQError(
                f'the weight of {layer.name} is quantized with a zero point, which ncnn does not have; set '
                '`ptq.weights.quantizer.symmetric=True`, and calibrate again.'
            )


def check_activation(name: str, spec: dict) -> None:
    """Refuses one activation's number format, see :func:`check_ncnn`; 16 bits are clipped, and computed in float."""
    where = f'the activation {name} is'
    if not build_quantizer(spec).uniform:
        raise PTQError(
            f'{where} of type {spec["type"]}, and ncnn knows uniform activations only; set '
            "`ptq.activations.quantizer.type='mmdet_ptq.AffineQuantizer'`."
        )
    if spec['bits'] == 8 and not spec['narrow_range']:
        raise PTQError(
            f"{where} quantized with all 256 codes, and ncnn's layers have 255; set "
            '`ptq.activations.quantizer.narrow_range=True`, or 7 bits with `ptq.activations.bits=7`, and '
            'calibrate again.'
        )
    if spec['bits'] == 8 and spec['num_channels'] and not (spec['symmetric'] or spec['shared_zero_point']):
        raise PTQError(
            f'{where} quantized with a zero point for each channel, and ncnn pads with one code; set '
            '`ptq.activations.quantizer.shared_zero_point=True`, and calibrate again.'
        )
