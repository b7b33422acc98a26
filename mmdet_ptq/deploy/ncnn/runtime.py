"""ncnn on the CPU, through its Python package."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from mmengine.logging import MMLogger, print_log
from torch import Tensor, nn

from mmdet_ptq.deploy.agreement import report_inputs
from mmdet_ptq.deploy.ncnn.export import export_ncnn
from mmdet_ptq.deploy.ncnn.formats import check_ncnn
from mmdet_ptq.deploy.ncnn.layer_inputs import ncnn_inputs
from mmdet_ptq.deploy.ncnn.layers import is_integer
from mmdet_ptq.deploy.ncnn.network import NCNN, NcnnNetwork
from mmdet_ptq.deploy.runtime import IntegerCoverage, Runtime
from mmdet_ptq.errors import PTQError
from mmdet_ptq.registry import RUNTIMES
from mmdet_ptq.wrapping import Structure
from mmdet_ptq.wrapping.flow import without_dataflow


@RUNTIMES.register_module(name='ncnn')
class NcnnRuntime(Runtime):
    """Runs ``model.param`` and ``model.bin`` in ncnn, image by image; see :class:`Runtime`.

    Args:
        path: The ``.param``.
        threads: Threads of a run. Defaults to None: one.
    """

    name = 'ncnn'
    suffix = '.param'
    weights = '.bin'
    packages = NCNN
    export_packages = (*NCNN, 'pnnx')
    compares = True
    # its x86 kernels multiply 16-bit numbers; on Arm two products of signed codes fit 16 bits
    saturation = 'ignore'
    products = 'float'
    # ncnn computes a layer in the format that the file gives it, or refuses the file
    evidence = 'the formats of the layers that it loads'

    def __init__(self, path: str | os.PathLike, threads: int | None = None) -> None:
        self._network = NcnnNetwork(path, threads or 1, packing=False)
        self.meta = self._network.meta
        if 'format' not in self.meta:
            raise PTQError(f'{os.fspath(path)!r} was not exported by mmdet-ptq; make one with tools/export.py.')

    @classmethod
    def check_formats(cls, structure: Structure) -> None:
        check_ncnn(structure)

    @classmethod
    def needed_activations(cls, bits: int) -> dict:
        # at 8 bits one code fewer, and one code to pad with; fewer bits fit as they are
        return dict(narrow_range=True, shared_zero_point=True) if bits == 8 else {}

    @classmethod
    def report_agreement(cls, logger: MMLogger, detector: nn.Module, path: Path, image: Tensor) -> None:
        report_inputs(logger, detector, ncnn_inputs(path, image), image, 'ncnn', without_dataflow)

    @classmethod
    def export(
        cls, detector: nn.Module, folder: str | os.PathLike, input_shape: tuple[int, int, int, int], **options
    ) -> Path:
        if options.get('dynamic_batch'):
            print_log('ncnn: networks take one image at a time; --dynamic-batch changes nothing', 'current')
        return export_ncnn(detector, input_shape, folder)

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        with self.running(image):
            results = [self._network.run(np.ascontiguousarray(one, np.float32)) for one in image]
        self.sized = True  # no size depends on what is in an image, and all have one shape
        return [np.stack(parts) for parts in zip(*results, strict=True)]

    def coverage(self) -> IntegerCoverage:
        """Which convolutions run in integers, by the formats of the layers: ncnn shows no graph of its own."""
        found = IntegerCoverage()
        integer = {layer.name for layer in self._network.layers if is_integer(layer)}
        for name, call in self.meta['layers'].items():
            (found.integer if name in integer else found.float).append(call)
        return found
