"""Integers out."""
from .build import build_detector
from .checkpoint import (
    is_quantized_checkpoint,
    load_quantized_state,
    quantized_state,
    read_quantized,
    save_quantized,
    stored_bytes,
)
from .integer_arithmetic import integer_arithmetic
from .integer_biases import settle_biases
from .integer_weights import IntegerWeight, integer_weight
from .onnx_export import export_onnx
from .packing import pack_codes, unpack_codes
from .raw_outputs import check_exportable
from .runtime_detector import runtime_detector, with_runtime
from .runtimes import IntegerCoverage, Runtime, get_runtime, model_bytes, open_model, runtime_names

__all__ = ['IntegerCoverage', 'IntegerWeight', 'Runtime', 'build_detector', 'check_exportable', 'export_onnx',
           'get_runtime', 'integer_arithmetic', 'integer_weight', 'is_quantized_checkpoint', 'load_quantized_state',
           'model_bytes', 'open_model', 'pack_codes', 'quantized_state', 'read_quantized', 'runtime_detector',
           'runtime_names', 'save_quantized', 'settle_biases', 'stored_bytes', 'unpack_codes', 'with_runtime']
