"""What tools/analyze.py does: prepare and observe as a run would, then measure tensor by tensor."""
from __future__ import annotations

import copy
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import is_main_process
from torch.utils.data import DataLoader

from .analysis.sensitivity import JSON, PICTURE, print_sensitivity, write_sensitivity
from .calibration.protect import Protection, protect_detector
from .calibration.sensitivity import Sensitivities, measure_sensitivity
from .engine import PTQRunner
from .engine.float_checkpoint import load_float_checkpoint
from .engine.stages import StageStore, file_hash, fingerprint


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
    load_float_checkpoint(runner.detector, runner.checkpoint)
    calibration, block = runner.calibration, runner.ptq
    folder = Path(cfg.work_dir) / 'analyze'
    # of its own: a run in the same work directory must not take these stages for its own
    runner.stages = StageStore(folder, resume=True)
    runner.float_detector = copy.deepcopy(runner.detector)
    weights = file_hash(runner.checkpoint) if Path(runner.checkpoint).is_file() else runner.checkpoint
    later = ('protect', 'reconstruct', 'global_loss')
    recipe = {key: value for key, value in block.to_dict().items() if key not in later}
    runner.inputs = fingerprint(recipe, str(cfg.model), weights, [str(i) for i in calibration.ids])
    runner.prepare()
    runner.observe()
    few = calibration.part(range(min(images, len(calibration))))
    batches = list(_batches(few, block.calibration.batch_size))
    measurements = folder / 'measurements.json'
    sensitivities = measure_sensitivity(runner.detector, runner.structure, batches, measurements)
    protection = protect_detector(
        runner.detector, runner.structure, block, batches, _batches(calibration, block.calibration.batch_size),
        resume_file=measurements)
    if is_main_process():
        write_sensitivity(cfg.work_dir, sensitivities, protection)
        print_sensitivity(sensitivities, protection)
        print(f'{JSON} and {PICTURE} are in {cfg.work_dir}')
    return sensitivities, protection


def _batches(dataset, batch_size: int) -> DataLoader:
    return DataLoader(dataset, batch_size, collate_fn=pseudo_collate)
