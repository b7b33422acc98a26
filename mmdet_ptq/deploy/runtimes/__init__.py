"""Inference runtimes that execute an exported detector in integers."""
from .base import IntegerCoverage, Runtime, get_runtime, model_bytes, open_model, runtime_names
from .ncnn import NcnnRuntime
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .tensorrt import TensorRT

__all__ = ['IntegerCoverage', 'NcnnRuntime', 'OnnxRuntime', 'OpenVino', 'Runtime', 'TensorRT', 'get_runtime',
           'model_bytes', 'open_model', 'runtime_names']
