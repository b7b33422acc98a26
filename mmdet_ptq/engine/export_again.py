"""Exporting a finished run's integer checkpoint again: other runtimes, shapes, storage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet_ptq.deploy import check_exportable, get_runtime, model_bytes, open_model, read_quantized
from mmdet_ptq.deploy.network.raw_outputs import first_outputs
from mmdet_ptq.deploy.onnx.end2end import check_end2end
from mmdet_ptq.engine.api import load_quantized
from mmdet_ptq.engine.stages.export import announce_coverage
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import check_space
from mmdet_ptq.registry import runtime_names
from mmdet_ptq.wrapping import Structure


def export_checkpoint(
    checkpoint: str | os.PathLike,
    runtimes: Sequence[str],
    out: str | None = None,
    size: Sequence[int] | None = None,
    dynamic_batch: bool = False,
    packed: bool = True,
    image: str | None = None,
    end2end: bool = False,
    config: Config | str | None = None,
    trust_config: bool = False,
) -> list[Path]:
    """Exports an integer checkpoint to runtimes and says what they compute in integers.

    Args:
        checkpoint: A ``quantized.pth``.
        runtimes: Names of runtimes.
        out: Folder that gets one folder per runtime. Defaults to None: the checkpoint's own.
        size: Height and width of the image tensor. Defaults to None: what the checkpoint was calibrated with.
        dynamic_batch: Whether the number of images stays open. Defaults to False.
        packed: Whether weights of 4 bits and less are stored as codes with a table. Defaults to True.
        image: Image file; the codes that runtimes compute on it are compared with the simulation's. Defaults to None.
        end2end: Whether the models decode and suppress too, and give boxes, scores and labels. Defaults to False.
        config: Config that replaces the one in the checkpoint. Defaults to None.
        trust_config: See :func:`.load_quantized`. Defaults to False.

    Returns:
        Paths of the models.

    Raises:
        PTQError: An unknown runtime, a missing package or file, a format the runtime does not know, a head that
            ``end2end`` does not know, a size that the detector does not take, or a folder that cannot be written.
    """
    logger = MMLogger.get_instance('mmdet_ptq_export')
    chosen = [get_runtime(name, '--to') for name in runtimes]
    if image is not None and not any(runtime.compares for runtime in chosen):
        raise PTQError(f'--compare reads the tensors of {", ".join(_names("compares"))}; add one of them to --to.')
    for runtime in chosen:
        if end2end and not runtime.end2end:
            raise PTQError(
                f'--end2end writes models for {" and ".join(_names("end2end"))}, not for {runtime.name}; '
                'leave one of them out.'
            )
    state = read_quantized(checkpoint)
    structure = Structure.from_dict(state['structure'])
    for runtime in chosen:
        # what can be written without the runtime itself is written for another machine
        runtime.check_export()
        runtime.check_formats(structure)
    shape = (1, 3, *size) if size else tuple(state['input_shape'])
    if len(shape) != 4:
        raise PTQError('the checkpoint does not tell the size of its images; give --input-shape HEIGHT WIDTH.')
    detector = load_quantized(checkpoint, config, trust_config=trust_config)
    check_exportable(detector)
    first_outputs(detector, shape)
    if end2end:
        check_end2end(detector)
    example = None if image is None else read_image(detector, image, shape)
    paths, folder = [], Path(out or Path(checkpoint).parent)
    for runtime in chosen:
        check_space(folder / runtime.name, 0, '--out')
        if not packed and not runtime.packs:
            logger.info(f'{runtime.name} stores 8 bits a weight always; --unpacked changes nothing')
    for runtime in chosen:
        path = runtime.export(
            detector, folder / runtime.name, shape, dynamic_batch=dynamic_batch, packed=packed, end2end=end2end
        )
        logger.info(f'{runtime.name}: {path} ({model_bytes(path) / 2**20:.2f} MiB)')
        if path.suffix == runtime.suffix:
            coverage = open_model(path).coverage()
            announce_coverage(runtime.name, coverage, runtime.evidence)
            if coverage.float and (why := runtime.explain_float(structure)):
                logger.warning(why)
        paths.append(path)
    if example is not None:
        for runtime, path in zip(chosen, paths, strict=True):
            if runtime.compares:
                runtime.report_agreement(logger, detector, path, example)
    return paths


def _names(ability: str) -> list[str]:
    """Names of the runtimes that have an ability, see :class:`.deploy.Runtime`."""
    return [name for name in runtime_names() if getattr(get_runtime(name), ability)]


def read_image(detector: nn.Module, path: str, shape: tuple[int, ...]) -> Tensor:
    """An image file as the network reads it, resized to the exported shape."""
    import mmcv

    image = mmcv.imread(path) if Path(path).is_file() else None
    if image is None:
        raise PTQError(f'--compare cannot read the image {path!r}; check the path.')
    tensor = torch.from_numpy(mmcv.imresize(image, (shape[3], shape[2]))).permute(2, 0, 1).contiguous()
    return detector.data_preprocessor(dict(inputs=[tensor], data_samples=None), False)['inputs']
