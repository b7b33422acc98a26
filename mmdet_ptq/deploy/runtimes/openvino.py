"""OpenVINO on the CPU."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from torch import nn

from ...errors import PTQError
from ...registry import RUNTIMES
from ...wrapping import Structure
from ..meta import read_meta, write_meta
from ..onnx_export import export_onnx, require
from ..onnx_nodes import check_activation_formats
from ..openvino_file import compact, strip_layout
from .base import IntegerCoverage, Runtime

META = 'mmdet_ptq'
_LAYERS = ('Convolution', 'Deconvolution', 'FullyConnected', 'MatMul')


@RUNTIMES.register_module(name='openvino')
class OpenVino(Runtime):
    """Runs ``model.xml`` in OpenVINO; see :class:`Runtime`."""

    name = 'openvino'
    suffix = '.xml'

    def __init__(self, path: str | os.PathLike, threads: int | None = None) -> None:
        self.check()
        import openvino
        core = openvino.Core()
        path = os.fspath(path)
        if not Path(path).with_suffix('.bin').is_file():
            raise PTQError(f'{path!r} lacks its weights {Path(path).with_suffix(".bin").name!r}; keep both files '
                           'together or export again.')
        try:
            model = core.read_model(path)
            meta = model.get_rt_info([META]).astype(str)
        except RuntimeError as error:
            told = 'was not exported by mmdet-ptq' if META in str(error) else 'is damaged or no OpenVINO model'
            raise PTQError(f'{path!r} {told}; make one with tools/export.py.') from error
        self.meta = read_meta(meta)
        # what is not quantized stays exact: the default takes bfloat16 where the processor has it
        options = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
        if threads:
            options['INFERENCE_NUM_THREADS'] = threads
        self.compiled = core.compile_model(model, 'CPU', options)

    @classmethod
    def check(cls) -> None:
        require('openvino', extra='openvino')

    @classmethod
    def check_formats(cls, structure: Structure) -> None:
        check_activation_formats(structure)

    @classmethod
    def export(cls, detector: nn.Module, folder: str | os.PathLike, input_shape: tuple[int, int, int, int],
               **options) -> Path:
        import openvino
        folder = Path(folder)
        with tempfile.TemporaryDirectory() as temporary:
            meta = export_onnx(detector, Path(temporary) / 'model.onnx', input_shape, runtime=cls.name, **options)
            model = openvino.convert_model(Path(temporary) / 'model.onnx')
            compact(model, meta['layers'])
            model.set_rt_info(write_meta(meta), [META])
            openvino.save_model(model, Path(temporary) / 'model.xml', compress_to_fp16=False)
            strip_layout(Path(temporary) / 'model.xml')
            # the file that is opened comes last: without it the model does not exist
            from ...files import write_atomic
            for suffix in ('.bin', cls.suffix):
                content = (Path(temporary) / f'model{suffix}').read_bytes()
                write_atomic(folder / f'model{suffix}', lambda file, content=content: file.write(content))
        return folder / f'model{cls.suffix}'

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        found = self.compiled([image])
        return [found[index] for index in range(len(self.compiled.outputs))]

    def coverage(self) -> IntegerCoverage:
        found, integer = IntegerCoverage(), set()
        for op in self.compiled.get_runtime_model().get_ops():
            info = op.get_rt_info()
            if info['layerType'].astype(str) in _LAYERS and info['runtimePrecision'].astype(str) in ('u8', 'i8'):
                # a folded convolution is called NAME/WithoutBiases
                integer.update(name.strip().split('/')[0]
                               for name in info['originalLayersNames'].astype(str).split(','))
        for call in self.meta['layers']:
            (found.integer if call in integer else found.float).append(call)
        return found
