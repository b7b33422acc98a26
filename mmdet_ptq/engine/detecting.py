"""What runs beside mmdet: an end-to-end model, and the program that detects with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mmengine.config import Config
from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.calibration.images import test_pipeline
from mmdet_ptq.deploy import Runtime
from mmdet_ptq.deploy.network.program import PROGRAM, detection_program
from mmdet_ptq.deploy.onnx.end2end import end2end_trouble
from mmdet_ptq.errors import PTQError, one_line
from mmdet_ptq.files import remove, write_text

END2END = 'end2end'


def export_detecting(
    detector: nn.Module,
    runtime: type[Runtime],
    folder: Path,
    shape: tuple[int, int, int, int],
    cfg: Config | None,
    options: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Writes the end-to-end model and its program beside a model, where the detector has them; says why if not.

    Args:
        detector: The quantized detector.
        runtime: The runtime.
        folder: Where the runtime's model lies.
        shape: Shape of the model's input.
        cfg: The config, whose test pipeline the program repeats.
        options: What the runtime's model was written with. Defaults to nothing.
    """
    for path in detecting_files(folder):  # of an earlier run
        remove(path)
    try:
        trouble = end2end_trouble(detector) if runtime.end2end else 'its models cannot suppress'
        if options.get('dynamic_size'):
            trouble = 'they take images of one size, and sizes are open (`ptq.export_size`)'
        if not trouble:
            program = program_of(detector, runtime, shape, cfg, f'{END2END}/model{runtime.suffix}')
            runtime.export(copy.deepcopy(detector).cpu(), folder / END2END, shape, end2end=True)
            write_text(folder / PROGRAM, program)
    except PTQError as error:
        trouble = str(error).rstrip('.')
    except Exception as error:  # of an exporter, or of the detector's own code: the run has its model
        trouble = one_line(error).rstrip('.')
    if trouble:
        for path in detecting_files(folder):  # of what failed later
            remove(path)
    told = (
        f'no end-to-end model and no {PROGRAM}: {trouble}' if trouble else f'{folder / PROGRAM} detects without mmdet'
    )
    print_log(f'{runtime.name}: {told}', 'current')


def program_of(detector: nn.Module, runtime: type[Runtime], shape: tuple, cfg: Config | None, model: str) -> str:
    """The program's text, see :func:`.detection_program`.

    Raises:
        PTQError: The config has no test pipeline, or the program does not know one of its steps.
    """
    if cfg is None:
        raise PTQError('there is no config, whose test pipeline it repeats')
    classes = (getattr(detector, 'dataset_meta', None) or {}).get('classes') or ()
    return detection_program(test_pipeline(cfg), detector, shape, runtime.opening, model, classes)


def detecting_files(folder: Path) -> list[Path]:
    """The files that :func:`export_detecting` wrote."""
    return [path for path in (folder / PROGRAM, *sorted((folder / END2END).glob('model*.*'))) if path.is_file()]
