"""Integers out."""

from mmdet_ptq.deploy.checkpoint.packing import pack_codes, unpack_codes
from mmdet_ptq.deploy.checkpoint.state import (
    is_quantized_checkpoint,
    load_quantized_state,
    quantized_state,
    read_quantized,
    save_quantized,
    stored_bytes,
)
from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic
from mmdet_ptq.deploy.integers.biases import settle_biases
from mmdet_ptq.deploy.integers.first_images import EXACT_IMAGES, first_images_exact
from mmdet_ptq.deploy.integers.weights import IntegerWeight, integer_weight
from mmdet_ptq.deploy.network.build import build_detector
from mmdet_ptq.deploy.network.raw_outputs import check_exportable
from mmdet_ptq.deploy.network.runtime_detector import runtime_detector, with_runtime
from mmdet_ptq.deploy.onnx.export import export_onnx
from mmdet_ptq.deploy.runtime import IntegerCoverage, Runtime, get_runtime, model_bytes, open_model
from mmdet_ptq.registry import runtime_names

__all__ = [
    'EXACT_IMAGES',
    'IntegerCoverage',
    'IntegerWeight',
    'Runtime',
    'build_detector',
    'check_exportable',
    'export_onnx',
    'first_images_exact',
    'get_runtime',
    'integer_arithmetic',
    'integer_weight',
    'is_quantized_checkpoint',
    'load_quantized_state',
    'model_bytes',
    'open_model',
    'pack_codes',
    'quantized_state',
    'read_quantized',
    'runtime_detector',
    'runtime_names',
    'save_quantized',
    'settle_biases',
    'stored_bytes',
    'unpack_codes',
    'with_runtime',
]
