"""What tools/analyze.py does: prepare and observe as a run would, then measure tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process

from mmdet_ptq.analysis import print_lines
from mmdet_ptq.analysis.sensitivity import JSON, PICTURE, print_sensitivity, write_sensitivity
from mmdet_ptq.calibration import WEIGHED_IMAGES, Protection, Sensitivities, measure_sensitivity, protect_detector
from mmdet_ptq.engine.runner import PTQRunner
from mmdet_ptq.engine.told import ToldStages


def analyze(cfg: Config, images: int = 16) -> tuple[Sensitivities, Protection]:
    """Measures a config's sensitivities, tries better formats, prints, and writes JSON and a picture.

    Everything is measured on calibration images. An interrupted analysis goes on where it stopped.

    Args:
        cfg: The config, with ``load_from``, ``work_dir`` and a ``ptq`` block.
        images: Calibration images that losses are measured on. Defaults to 16.

    Returns:
        The sensitivities, and what protection would change.

    Raises:
        PTQError: The config, the checkpoint or the images cannot be used, or a budget of ``ptq.protect`` cannot be
            kept.
    """
    runner = PTQRunner.from_cfg(cfg)
    folder = Path(cfg.work_dir) / 'analyze'
    # of its own: a run in the same work directory must not take these stages for its own
    runner.stages = ToldStages(folder, resume=True)
    runner.load()
    runner.prepare()
    runner.observe()
    batches, measurements = list(runner.first_images(images)), folder / 'measurements.json'
    sensitivities = measure_sensitivity(runner.detector, runner.structure, batches, measurements)
    protection = protect_detector(
        runner.detector,
        runner.structure,
        runner.ptq,
        batches,
        runner.calibration_loader(),
        runner.stored_bytes(),
        measurements,
        runner.first_images(WEIGHED_IMAGES),
    )
    if is_main_process():
        write_sensitivity(cfg.work_dir, sensitivities, protection)
        print_sensitivity(sensitivities, protection)
        print_lines([f'{JSON} and {PICTURE} are in {cfg.work_dir}'])
    return sensitivities, protection
