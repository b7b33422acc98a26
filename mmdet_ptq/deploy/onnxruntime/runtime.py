"""ONNX Runtime."""

from __future__ import annotations

import functools
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet_ptq.deploy.agreement import name_first
from mmdet_ptq.deploy.network.canvas import with_size
from mmdet_ptq.deploy.network.meta import called
from mmdet_ptq.deploy.network.program import Opening
from mmdet_ptq.deploy.onnx.dialect import Dialect
from mmdet_ptq.deploy.onnx.export import export_onnx, model_meta
from mmdet_ptq.deploy.onnx.nodes import check_activation_formats
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.deploy.onnxruntime.memory import check_onnx_memory
from mmdet_ptq.deploy.requirements import ONNX
from mmdet_ptq.deploy.runtime import IntegerCoverage, Runtime, worst_case
from mmdet_ptq.errors import PTQError, first_line
from mmdet_ptq.registry import RUNTIMES
from mmdet_ptq.wrapping import Structure

# in this order, where they are present
PROVIDERS = ('TensorrtExecutionProvider', 'CUDAExecutionProvider', 'CPUExecutionProvider')
# beside all that are called QLinear
_INTEGER = ('ConvInteger', 'MatMulInteger', 'MatMulIntegerToFloat', 'QGemm')


@RUNTIMES.register_module(name='onnxruntime')
class OnnxRuntime(Runtime):
    """Runs ``model.onnx`` in ONNX Runtime; see :class:`Runtime`."""

    name = 'onnxruntime'
    suffix = '.onnx'
    # the first with 4-bit initializers and opset 21
    packages = export_packages = ('onnxruntime>=1.20', *ONNX)
    # it computes a convolution in integers only if its output is quantized, too
    dataflow = 'balanced'
    end2end = packs = compares = takes_parts = dynamic_size = True
    opening = Opening(
        'onnxruntime',
        "session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])",
        "session.run(None, {'input': tensor, 'size': size})",
    )

    def __init__(self, path: str | os.PathLike, threads: int | None = None) -> None:
        self.meta = model_meta(path)
        self.sized = check_onnx_memory(path, self.meta)
        self.path, self.threads = os.fspath(path), threads
        self.session = self._session()

    def _session(self, optimized: str | None = None):
        self.check()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.threads:
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
        if optimized:
            options.optimized_model_filepath = optimized
            # the last level changes the layout of float convolutions and saves what no checker reads
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        present = onnxruntime.get_available_providers()
        try:
            return onnxruntime.InferenceSession(self.path, options, providers=[p for p in PROVIDERS if p in present])
        except Exception as error:  # the bindings raise classes of their own
            reason = first_line(error).replace(f'Load model from {self.path} failed:', '')
            raise PTQError(f'ONNX Runtime cannot open {self.path!r}: {reason[:200]}') from error

    @staticmethod
    @functools.cache
    def saturates() -> bool:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        image, weight, exact = worst_case()
        # the exact sum is code 240, the saturated one about half of it
        constants = dict(
            one=np.float32(1), zero=np.uint8(0), weight=weight, weight_zero=np.int8(0), scale=np.float32(exact / 240)
        )
        graph = helper.make_graph(
            [
                helper.make_node(
                    'QLinearConv', ['image', 'one', 'zero', 'weight', 'one', 'weight_zero', 'scale', 'zero'], ['sums']
                )
            ],
            'worst_case',
            [helper.make_tensor_value_info('image', TensorProto.UINT8, image.shape)],
            [helper.make_tensor_value_info('sums', TensorProto.UINT8, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
        return bool((session.run(None, {'image': image})[0] != 240).any())

    @classmethod
    def check_formats(cls, structure: Structure) -> None:
        check_activation_formats(structure)

    @classmethod
    def export(
        cls, detector: nn.Module, folder: str | os.PathLike, input_shape: tuple[int, int, int, int], **options
    ) -> Path:
        path = Path(folder) / 'model.onnx'
        export_onnx(detector, path, input_shape, runtime=cls.name, **options)
        if divisor := options.get('dynamic_size'):
            cls.check_other_size(path, detector, input_shape, divisor)
        return path

    @classmethod
    def dialect(cls) -> Dialect:
        from mmdet_ptq.deploy.onnx import passes
        from mmdet_ptq.deploy.onnx.channel_scales import absorb_channel_scales
        from mmdet_ptq.deploy.onnx.packing import narrow_biases, pack_weights
        from mmdet_ptq.deploy.onnxruntime.integer_forms import (
            add_to_clip,
            average_images,
            norms_by_channel,
            products_by_pixel,
        )

        return Dialect(
            clip_codes=True,
            unsigned=True,
            slices_into_kernel=False,
            passes=(
                passes.integer_products,
                passes.drop_redundant_clips,
                passes.quantize_movements,
                partial(absorb_channel_scales, outputs=False),
                passes.drop_redundant_clips,
                passes.clip_codes,
                average_images,
                add_to_clip,
                norms_by_channel,
                passes.keep_float,
                partial(passes.integer_biases, stored=True),
                products_by_pixel,
                passes.weight_zero_points,
            ),
            packings=(pack_weights, narrow_biases),
        )

    @classmethod
    def explain_float(cls, structure: Structure) -> str:
        if structure.sites:
            return ''
        return (
            'the checkpoint was calibrated without `ptq.dataflow`, and ONNX Runtime computes in integers only what is '
            "quantized behind a layer, too: run tools/ptq.py with `ptq.export=['onnxruntime']`."
        )

    @classmethod
    def report_agreement(cls, logger: MMLogger, detector: nn.Module, path: Path, image: Tensor) -> None:
        name_first(
            logger,
            compare_codes(detector, path, image, exact=True),
            what='quantized tensors compared from the image to the outputs, in the arithmetic of integer '
            'kernels, as they are evaluated',
        )
        # in float32 single codes on boundaries would change others behind them
        name_first(logger, compare_codes(detector, path, image, follow=True))

    def remark(self) -> str:
        # other providers have kernels of their own
        return super().remark() if self.session.get_providers()[0] == 'CPUExecutionProvider' else ''

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        names = [given.name for given in self.session.get_inputs()]
        with self.running(inputs):
            return self.session.run(None, dict(zip(names, with_size(inputs, len(names)), strict=True)))

    def coverage(self) -> IntegerCoverage:
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / 'optimized.onnx')
            self._session(path)
            nodes = onnx.load(path, load_external_data=False).graph.node
        found = IntegerCoverage()
        integer = {node.name for node in nodes if node.op_type.startswith('QLinear') or node.op_type in _INTEGER}
        for call in called(self.meta):
            # a fused node is named after the node it came from, with something before or after
            mine = any(call == name or name.startswith(f'{call}_') for name in integer)
            (found.integer if mine else found.float).append(call)
        return found
