"""Exporting a finished run's integer checkpoint again: other runtimes, shapes, storage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet_ptq.calibration.images import test_pipeline, without_annotations
from mmdet_ptq.deploy import Runtime, get_runtime, model_bytes, open_model, read_quantized
from mmdet_ptq.deploy.network.canvas import open_divisor
from mmdet_ptq.deploy.network.parts import has_regions
from mmdet_ptq.deploy.network.program import PROGRAM
from mmdet_ptq.deploy.network.raw_outputs import first_outputs
from mmdet_ptq.deploy.onnx.end2end import check_end2end
from mmdet_ptq.engine.api import load_quantized
from mmdet_ptq.engine.detecting import program_of
from mmdet_ptq.engine.stages.export import announce_coverage
from mmdet_ptq.errors import PTQError, one_line
from mmdet_ptq.files import check_space, remove, write_text
from mmdet_ptq.registry import runtime_names
from mmdet_ptq.wrapping import Structure


def export_checkpoint(
    checkpoint: str | os.PathLike,
    runtimes: Sequence[str],
    *,
    out: str | None = None,
    size: Sequence[int] | None = None,
    dynamic_batch: bool = False,
    packed: bool = True,
    image: str | None = None,
    end2end: bool = False,
    dynamic_size: bool = False,
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
        dynamic_size: Whether the height and the width of images stay open. Defaults to False.
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
    _check_asked(chosen, end2end, image)
    state = read_quantized(checkpoint)
    structure = Structure.from_dict(state['structure'])
    for runtime in chosen:
        # what can be written without the runtime itself is written for another machine
        runtime.check_export()
        runtime.check_formats(structure)
    shape = _input_shape(state, size)
    detector = load_quantized(checkpoint, config, trust_config=trust_config)
    for runtime in chosen:
        runtime.check_detector(detector)
        if dynamic_size:
            runtime.check_dynamic_size(detector)
    first_outputs(detector, shape)
    if end2end:
        check_end2end(detector)
    if end2end and image is not None and has_regions(detector):
        raise PTQError('--compare reads the networks of two stages one by one; leave out --end2end, or --compare.')
    example = None if image is None else read_image(detector, image, shape)
    folder = Path(out or Path(checkpoint).parent)
    for runtime in chosen:
        check_space(folder / runtime.name, 0, '--out')
        if not packed and not runtime.packs:
            logger.info(f'{runtime.name} stores 8 bits a weight always; --unpacked changes nothing')
    options = dict(dynamic_batch=dynamic_batch, packed=packed, end2end=end2end)
    if dynamic_size:
        divisor = open_divisor(detector, [shape[2:]])
        if any(side % divisor for side in shape[2:]):
            raise PTQError(
                f'--input-shape must be multiples of {divisor}, which images are padded to, got {shape[2]}x{shape[3]}.'
            )
        options['dynamic_size'] = divisor
    paths = [_export(logger, runtime, detector, structure, folder / runtime.name, shape, options) for runtime in chosen]
    if example is not None:
        for runtime, path in zip(chosen, paths, strict=True):
            if runtime.compares:
                runtime.report_agreement(logger, detector, path, example)
    return paths


def _check_asked(chosen: list[type[Runtime]], end2end: bool, image: str | None) -> None:
    """Refuses what the runtimes cannot do, before the checkpoint is read."""
    if image is not None and not any(runtime.compares for runtime in chosen):
        raise PTQError(f'--compare reads the tensors of {", ".join(_names("compares"))}; add one of them to --to.')
    for runtime in chosen:
        if end2end and not runtime.end2end:
            raise PTQError(
                f'--end2end writes models for {" and ".join(_names("end2end"))}, not for {runtime.name}; '
                'leave one of them out.'
            )


def _input_shape(state: dict, size: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of one image: what the checkpoint was calibrated with, in the size that is asked for."""
    shape = tuple(state['input_shape'])
    if len(shape) != 4:
        if not size:
            raise PTQError('the checkpoint does not tell the size of its images; give --input-shape HEIGHT WIDTH.')
        shape = (1, 3)  # of a version that knew no other channels
    return (*shape[:2], *size) if size else shape


def _export(
    logger: MMLogger,
    runtime: type[Runtime],
    detector: nn.Module,
    structure: Structure,
    folder: Path,
    shape: tuple[int, ...],
    options: dict[str, bool],
) -> Path:
    """Exports to one runtime and says what it computes in integers."""
    path = runtime.export(detector, folder, shape, **options)
    logger.info(f'{runtime.name}: {path} ({model_bytes(path) / 2**20:.2f} MiB)')
    if options['end2end']:
        _add_program(logger, detector, runtime, path, shape)
    if path.suffix == runtime.suffix:
        coverage = open_model(path).whole_coverage()
        announce_coverage(runtime.name, coverage, runtime.evidence)
        if coverage.float and (why := runtime.explain_float(structure)):
            logger.warning(why)
    return path


def _add_program(logger: MMLogger, detector: nn.Module, runtime: type[Runtime], path: Path, shape: tuple) -> None:
    """Writes the program that detects with an end-to-end model beside it, where the config's pipeline is known."""
    file = path.with_name(PROGRAM)
    remove(file)
    try:
        write_text(file, program_of(detector, runtime, shape, detector.cfg, path.name))
        logger.info(f'{runtime.name}: {file} detects without mmdet')
    except PTQError as error:
        logger.info(f'{runtime.name}: no {PROGRAM}: {error}')


def _names(ability: str) -> list[str]:
    """Names of the runtimes that have an ability, see :class:`.deploy.Runtime`."""
    return [name for name in runtime_names() if getattr(get_runtime(name), ability)]


def read_image(detector: nn.Module, path: str, shape: tuple[int, ...]) -> Tensor:
    """An image file as the network reads it: through the config's test pipeline, in the exported size.

    Args:
        detector: The detector, with its config.
        path: The image file.
        shape: Shape of the exported model's input.

    Raises:
        PTQError: There is no such file, or the pipeline cannot read it as images of this shape.
    """
    if not Path(path).is_file():
        raise PTQError(f'--compare cannot read the image {path!r}; check the path.')
    pipeline = Compose(without_annotations(test_pipeline(detector.cfg)))
    try:
        batch = pseudo_collate([pipeline(dict(img_path=str(path), img_id=0))])
        image = detector.data_preprocessor(batch, False)['inputs']
    except Exception as error:  # of any step of the pipeline
        raise PTQError(
            f'--compare cannot read the image {path!r} through the test pipeline: {one_line(error)}.'
        ) from error
    if image.shape[1] != shape[1]:
        raise PTQError(f'--compare reads {image.shape[1]} channels from {path!r}, the detector takes {shape[1]}.')
    return image if image.shape == shape else F.interpolate(image, shape[2:], mode='bilinear')
