"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
import os
import tempfile
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet_ptq.deploy.agreement import report_inputs
from mmdet_ptq.deploy.network.canvas import with_size
from mmdet_ptq.deploy.network.meta import called, checked_meta, write_meta
from mmdet_ptq.deploy.network.parts import part_path, parts_of
from mmdet_ptq.deploy.network.program import Opening
from mmdet_ptq.deploy.network.seal import seal
from mmdet_ptq.deploy.onnx.dialect import Dialect
from mmdet_ptq.deploy.onnx.export import export_onnx, model_meta
from mmdet_ptq.deploy.onnx.nodes import check_activation_formats
from mmdet_ptq.deploy.openvino.compact import compact, strip_layout
from mmdet_ptq.deploy.openvino.deformable import deformable_extension
from mmdet_ptq.deploy.openvino.layer_inputs import openvino_choices, openvino_inputs
from mmdet_ptq.deploy.openvino.memory import check_openvino_memory
from mmdet_ptq.deploy.openvino.model import FLOAT32, META, shared_core
from mmdet_ptq.deploy.requirements import ONNX
from mmdet_ptq.deploy.runtime import IntegerCoverage, Runtime, file_digest, remove_parts, worst_case
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import remove, write_atomic
from mmdet_ptq.predictions.queries import chooses_queries
from mmdet_ptq.registry import RUNTIMES
from mmdet_ptq.wrapping import Structure
from mmdet_ptq.wrapping.state import only_read_tensors

_LAYERS = ('Convolution', 'Deconvolution', 'FullyConnected', 'MatMul')


@RUNTIMES.register_module(name='openvino')
class OpenVino(Runtime):
    """Runs ``model.xml`` in OpenVINO; see :class:`Runtime`."""

    name = 'openvino'
    suffix = '.xml'
    weights = '.bin'
    packages = ('openvino>=2025.0',)
    export_packages = (*packages, *ONNX)
    end2end = compares = takes_parts = dynamic_size = True
    opening = Opening(
        'openvino',
        f"model = openvino.Core().compile_model(str(path), 'CPU', {FLOAT32})",
        # heads that do not end boxes (YOLOX) leave the size unread, and it is no input then
        'list(model([tensor, size][: len(model.inputs)]).values())',
    )

    def __init__(self, path: str | os.PathLike, threads: int | None = None) -> None:
        self.check()
        core = shared_core()
        path = os.fspath(path)
        if not Path(path).with_suffix('.bin').is_file():
            raise PTQError(
                f'{path!r} lacks its weights {Path(path).with_suffix(".bin").name!r}; keep both files '
                'together or export again.'
            )
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise PTQError(f'{path!r} is damaged or no OpenVINO model; make one with tools/export.py.') from error
        if META not in model.rt_info:
            raise PTQError(f'{path!r} was not exported by mmdet-ptq; make one with tools/export.py.')
        meta = model.get_rt_info([META]).astype(str)
        self.meta = checked_meta(meta, path, Path(path).with_suffix(self.weights))
        self.sized = check_openvino_memory(path, model, self.meta)
        options = {**FLOAT32, 'PERFORMANCE_HINT': 'LATENCY'}
        if threads:
            options['INFERENCE_NUM_THREADS'] = threads
        self.compiled = core.compile_model(model, 'CPU', options)

    @staticmethod
    @functools.cache
    def saturates() -> bool:
        import openvino
        from openvino import opset13 as ops

        image, weight, exact = worst_case()
        given = ops.parameter(image.shape, np.float32)
        low, high = np.float32(0), np.float32(255)
        codes = ops.fake_quantize(given, low, high, low, high, 256)
        # a scale of 1 would be folded away, and the convolution would be a float one
        kernel = ops.multiply(ops.convert(ops.constant(weight), 'f32'), np.float32(0.5))
        sums = ops.convolution(codes, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
        compiled = shared_core().compile_model(
            openvino.Model([sums], [given]), 'CPU', {**FLOAT32, 'INFERENCE_NUM_THREADS': 1}
        )
        return bool((compiled([image.astype(np.float32)])[0] < 0.9 * 0.5 * exact).any())

    @classmethod
    def check_formats(cls, structure: Structure) -> None:
        check_activation_formats(structure)

    @classmethod
    def export(
        cls, detector: nn.Module, folder: str | os.PathLike, input_shape: tuple[int, int, int, int], **options
    ) -> Path:
        path = Path(folder) / f'model{cls.suffix}'
        with tempfile.TemporaryDirectory() as temporary:
            onnx = Path(temporary) / 'model.onnx'
            parts = export_onnx(detector, onnx, input_shape, runtime=cls.name, **options).get('parts', {})
            # the file that is opened goes first and comes last: it never lies beside the weights of another model
            remove(path)
            remove_parts(path)
            for name in parts:
                file = part_path(path, name)
                cls._convert(part_path(onnx, name), file)
                parts[name] = file_digest(file)
            cls._convert(onnx, path, dict(parts=parts) if parts else {})
        if divisor := options.get('dynamic_size'):
            cls.check_other_size(path, detector, input_shape, divisor)
        return path

    @classmethod
    def _convert(cls, onnx: Path, path: Path, told: dict = MappingProxyType({})) -> None:
        """Writes one network; it says of itself what the ONNX file says, and what is ``told``."""
        import openvino

        temporary, meta = onnx.with_suffix(cls.suffix), {**model_meta(onnx), **told}
        try:
            model = openvino.convert_model(onnx, extension=[deformable_extension()])
        except Exception as error:
            # of several operations the last fails by itself; behind it is a summary
            told = str(error).partition('\nSummary:')[0].strip() or type(error).__name__
            raise PTQError(
                f'OpenVINO cannot convert the detector: {told.splitlines()[-1].rstrip(".")}; replace that operation, '
                "or remove 'openvino' from `ptq.export`."
            ) from error
        compact(model, meta['layers'])
        model.set_rt_info(write_meta(meta), [META])
        openvino.save_model(model, temporary, compress_to_fp16=False)
        strip_layout(temporary)
        weights = temporary.with_suffix(cls.weights).read_bytes()
        text = seal(temporary.read_bytes(), weights)
        for suffix, content in ((cls.weights, weights), (cls.suffix, text)):
            write_atomic(path.with_suffix(suffix), lambda file, content=content: file.write(content))

    @classmethod
    def dialect(cls) -> Dialect:
        from mmdet_ptq.deploy.onnx import passes
        from mmdet_ptq.deploy.onnx.channel_scales import fold_affine
        from mmdet_ptq.deploy.openvino.maxima import sort_for_maxima

        # between layers it computes in what fuses best; more quantizers make it slower
        return Dialect(
            between_layers=False,
            rounds_wide=False,
            compact=False,  # of its own, after the conversion; names stay for those who look at the model
            passes=(
                passes.drop_redundant_clips,
                fold_affine,
                partial(passes.integer_biases, stored=False),
                sort_for_maxima,
            ),
        )

    @classmethod
    def report_agreement(cls, logger: MMLogger, detector: nn.Module, path: Path, image: Tensor) -> None:
        found = {}
        for part in parts_of(detector, image):
            found |= openvino_inputs(part_path(path, part.name) if part.name else path, *part.inputs)
        choices = openvino_choices(path, image) if chooses_queries(detector) else None
        report_inputs(logger, detector, found, image, 'OpenVINO', only_read_tensors, choices)

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        taken = len(self.compiled.inputs)
        if taken == 1:  # a size that the head does not read is no input
            inputs = inputs[:1]
        with self.running(inputs):
            found = self.compiled(with_size(inputs, taken))
        return [found[index] for index in range(len(self.compiled.outputs))]

    def coverage(self) -> IntegerCoverage:
        found, integer = IntegerCoverage(), set()
        for op in self.compiled.get_runtime_model().get_ops():
            info = op.get_rt_info()
            kind, names = (info[key].astype(str) for key in ('layerType', 'originalLayersNames'))
            if info['runtimePrecision'].astype(str) not in ('u8', 'i8'):
                continue
            if kind in _LAYERS:
                # a folded convolution is called NAME/WithoutBiases
                integer.update(name.strip().split('/')[0] for name in names.split(','))
            elif kind == 'Subgraph':
                # with AVX512 an attention is one kernel; what is behind a slash only dequantizes
                integer.update(name.strip() for name in names.split(','))
        for call in called(self.meta):
            (found.integer if call in integer else found.float).append(call)
        return found
