"""Exporting a finished run's integer checkpoint again: other runtimes, shapes, storage."""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet_ptq.deploy import check_exportable, get_runtime, model_bytes, open_model, read_quantized
from mmdet_ptq.deploy.agreement import compare_layer_inputs
from mmdet_ptq.deploy.ncnn.layer_inputs import ncnn_inputs
from mmdet_ptq.deploy.network.raw_outputs import first_outputs
from mmdet_ptq.deploy.onnx.end2end import RUNTIMES as END2END_RUNTIMES
from mmdet_ptq.deploy.onnx.end2end import check_end2end
from mmdet_ptq.deploy.onnxruntime.compare import TensorAgreement, compare_codes
from mmdet_ptq.deploy.openvino.layer_inputs import openvino_inputs
from mmdet_ptq.engine.api import load_quantized
from mmdet_ptq.engine.stages.export import announce_coverage
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import check_space
from mmdet_ptq.wrapping import Structure
from mmdet_ptq.wrapping.flow import without_dataflow
from mmdet_ptq.wrapping.state import STATE, only_read_tensors

# a model with ReLU activations agrees at least so far
AGREEMENT = 0.999
INPUT = 'the input of '


def export_checkpoint(checkpoint: str | os.PathLike, runtimes: Sequence[str], out: str | None = None,
                      size: Sequence[int] | None = None, dynamic_batch: bool = False, packed: bool = True,
                      image: str | None = None, end2end: bool = False) -> list[Path]:
    """Exports an integer checkpoint to runtimes and says what they compute in integers.

    Args:
        checkpoint: A ``quantized.pth``.
        runtimes: Names of runtimes.
        out: Folder that gets one folder per runtime. Defaults to None: the checkpoint's own.
        size: Height and width of the image tensor. Defaults to None: what the checkpoint was calibrated with.
        dynamic_batch: Whether the number of images stays open. Defaults to False.
        packed: Whether weights of 4 bits and less are stored as codes with a table. Defaults to True.
        image: Image file; the codes that ONNX Runtime, OpenVINO and ncnn compute on it are compared with the
            simulation's. Defaults to None.
        end2end: Whether the models decode and suppress too, and give boxes, scores and labels. Defaults to False.

    Returns:
        Paths of the models.

    Raises:
        PTQError: An unknown runtime, a missing package or file, a format the runtime does not know, a head that
            ``end2end`` does not know, a size that the detector does not take, or a folder that cannot be written.
    """
    logger = MMLogger.get_instance('mmdet_ptq_export')
    chosen = [get_runtime(name, '--to') for name in runtimes]
    if image is not None and not _REPORTS.keys() & set(runtimes):
        raise PTQError(f'--compare reads the tensors of {", ".join(_REPORTS)}; add one of them to --to.')
    for name in runtimes:
        if end2end and name not in END2END_RUNTIMES:
            raise PTQError(f'--end2end writes models for {" and ".join(END2END_RUNTIMES)}, not for {name}; leave one '
                           'of them out.')
    state = read_quantized(checkpoint)
    structure = Structure.from_dict(state['structure'])
    for runtime in chosen:
        # what can be written without the runtime itself is written for another machine
        runtime.check_export()
        runtime.check_formats(structure)
    shape = (1, 3, *size) if size else tuple(state['input_shape'])
    if len(shape) != 4:
        raise PTQError('the checkpoint does not tell the size of its images; give --input-shape HEIGHT WIDTH.')
    detector = load_quantized(checkpoint)
    check_exportable(detector)
    first_outputs(detector, shape)
    if end2end:
        check_end2end(detector)
    example = None if image is None else read_image(detector, image, shape)
    paths, folder = [], Path(out or Path(checkpoint).parent)
    for runtime in chosen:
        check_space(folder / runtime.name, 0, '--out')
        if not packed and runtime.name != 'onnxruntime':
            logger.info(f'{runtime.name} stores 8 bits a weight always; --unpacked changes nothing')
    for runtime in chosen:
        path = runtime.export(detector, folder / runtime.name, shape,
                              dynamic_batch=dynamic_batch, packed=packed, end2end=end2end)
        logger.info(f'{runtime.name}: {path} ({model_bytes(path) / 2**20:.2f} MiB)')
        if path.suffix == runtime.suffix:
            coverage = open_model(path).coverage()
            announce_coverage(runtime.name, coverage, runtime.evidence)
            if runtime.name == 'onnxruntime' and coverage.float and not structure.sites:
                logger.warning(
                    'the checkpoint was calibrated without `ptq.dataflow`, and ONNX Runtime computes in integers only '
                    "what is quantized behind a layer, too: run tools/ptq.py with `ptq.export=['onnxruntime']`.")
        paths.append(path)
    if example is not None:
        for runtime, path in zip(chosen, paths, strict=True):
            if runtime.name in _REPORTS:
                _REPORTS[runtime.name](logger, detector, path, example)
    return paths


def read_image(detector: nn.Module, path: str, shape: tuple[int, ...]) -> Tensor:
    """An image file as the network reads it, resized to the exported shape."""
    import mmcv
    image = mmcv.imread(path) if Path(path).is_file() else None
    if image is None:
        raise PTQError(f'--compare cannot read the image {path!r}; check the path.')
    tensor = torch.from_numpy(mmcv.imresize(image, (shape[3], shape[2]))).permute(2, 0, 1).contiguous()
    return detector.data_preprocessor(dict(inputs=[tensor], data_samples=None), False)['inputs']


def report_agreement(logger: MMLogger, detector: nn.Module, path: Path, image: Tensor) -> None:
    """Logs how far ONNX Runtime's integers are the simulation's, and names the first tensor that diverges."""
    _name_first(logger, compare_codes(detector, path, image, exact=True),
                what='quantized tensors compared from the image to the outputs, in the arithmetic of integer kernels, '
                     'as they are evaluated')
    # in float32 single codes on boundaries would change others behind them
    _name_first(logger, compare_codes(detector, path, image, follow=True))


def report_openvino(logger: MMLogger, detector: nn.Module, path: Path, image: Tensor) -> None:
    """The same of OpenVINO, by what layers read: it leaves out the quantizers between the layers."""
    _report_inputs(logger, detector, openvino_inputs(path, image), image, 'OpenVINO', only_read_tensors)


def report_ncnn(logger: MMLogger, detector: nn.Module, path: Path, image: Tensor) -> None:
    """The same of ncnn, by what layers read: between them it computes in float."""
    _report_inputs(logger, detector, ncnn_inputs(path, image), image, 'ncnn', without_dataflow)


def _report_inputs(logger: MMLogger, detector: nn.Module, inputs: Mapping[str, np.ndarray | None], image: Tensor,
                   runtime: str, given: Callable[[nn.Module], AbstractContextManager]) -> None:
    for call, value in inputs.items():
        if value is None:
            logger.info(f'{runtime} reads the input of {call} in float, so that it cannot be compared')
    _report(logger, compare_layer_inputs(detector, inputs, image),
            f'inputs of layers compared with {runtime}: from the image to the outputs')
    _name_first(logger, compare_layer_inputs(detector, inputs, image, follow=True), INPUT)
    left_out = sum(not count for count in getattr(detector, STATE).readers.values())
    if left_out:
        logger.info(f'{left_out} quantizers between the layers are not in the model for {runtime}; the simulation '
                    'without them:')
        _name_first(logger, compare_layer_inputs(detector, inputs, image, follow=True, within=given), INPUT)


def _report(logger: MMLogger, found: list[TensorAgreement], what: str) -> None:
    if not found:
        raise PTQError('--compare compares quantized tensors, and the model has none; leave it out.')
    shares = [entry.identical for entry in found]
    logger.info(f'{len(found)} {what}, {sum(shares) / len(shares):.3%} of the codes are the same on average, '
                f'{min(shares):.3%} in the worst')


def _name_first(logger: MMLogger, found: list[TensorAgreement], kind: str = '',
                what: str = 'compared each for itself, computed from the same codes') -> None:
    _report(logger, found, what)
    first = next((entry for entry in found if entry.identical < AGREEMENT), None)
    if first is None:
        logger.info(f'every tensor has at least {AGREEMENT:.1%} of its codes in common')
    else:
        logger.warning(f'the first that diverges is {kind}{first.name}: {first.identical:.3%} of its codes are the '
                       f'same, the largest difference is {first.largest}')


_REPORTS = {'onnxruntime': report_agreement, 'openvino': report_openvino, 'ncnn': report_ncnn}
