"""Float detector in, quantized detector out."""

from mmdet_ptq.wrapping.coverage import CoverageRow, coverage_rows, integer_mac_share
from mmdet_ptq.wrapping.preparing.equalization import channel_magnitudes, equalize, log_equalization
from mmdet_ptq.wrapping.preparing.junctions import Junction, find_junctions
from mmdet_ptq.wrapping.preparing.prepare import check_finite, prepare_detector
from mmdet_ptq.wrapping.state import QuantizationState, is_quantized, quantization_mode, set_mode
from mmdet_ptq.wrapping.structure import LayerStructure, Structure, apply_structure
from mmdet_ptq.wrapping.weights import QuantizedWeight, float_weight, freeze_weights, quantized_weights, thaw_weights

__all__ = [
    'CoverageRow',
    'Junction',
    'LayerStructure',
    'QuantizationState',
    'QuantizedWeight',
    'Structure',
    'apply_structure',
    'channel_magnitudes',
    'check_finite',
    'coverage_rows',
    'equalize',
    'find_junctions',
    'float_weight',
    'freeze_weights',
    'integer_mac_share',
    'is_quantized',
    'log_equalization',
    'prepare_detector',
    'quantization_mode',
    'quantized_weights',
    'set_mode',
    'thaw_weights',
]
