"""Inference runtimes that execute an exported detector in integers."""
from mmdet_ptq.deploy.ncnn.runtime import NcnnRuntime
from mmdet_ptq.deploy.onnxruntime.runtime import OnnxRuntime
from mmdet_ptq.deploy.openvino.runtime import OpenVino
from mmdet_ptq.deploy.runtime import IntegerCoverage, Runtime, get_runtime, model_bytes, open_model, runtime_names
from mmdet_ptq.deploy.tensorrt.runtime import TensorRT

__all__ = ['IntegerCoverage', 'NcnnRuntime', 'OnnxRuntime', 'OpenVino', 'Runtime', 'TensorRT', 'get_runtime',
           'model_bytes', 'open_model', 'runtime_names']
