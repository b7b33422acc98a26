"""Float detector in, quantized detector out."""

from mmdet_ptq.wrapping.coverage import CoverageRow, coverage_rows, integer_mac_share
from mmdet_ptq.wrapping.preparing.prepare import check_detector, planned_layers, prepare_detector
from mmdet_ptq.wrapping.state import QuantizationState, is_quantized, quantization_mode, set_mode
from mmdet_ptq.wrapping.structure import LayerStructure, Structure, apply_structure
from mmdet_ptq.wrapping.weights import QuantizedWeight, float_weight, freeze_weights, quantized_weights, thaw_weights

__all__ = [
    'CoverageRow',
    'LayerStructure',
    'QuantizationState',
    'QuantizedWeight',
    'Structure',
    'apply_structure',
    'check_detector',
    'coverage_rows',
    'float_weight',
    'freeze_weights',
    'integer_mac_share',
    'is_quantized',
    'planned_layers',
    'prepare_detector',
    'quantization_mode',
    'quantized_weights',
    'set_mode',
    'thaw_weights',
]
