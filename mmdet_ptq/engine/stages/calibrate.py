"""The stages that calibrate: float detector in, integer checkpoint out."""

from __future__ import annotations

import copy
import functools
import logging

from mmengine.dist import barrier, broadcast, is_main_process
from mmengine.logging import print_log

from mmdet_ptq.analysis import REPORT
from mmdet_ptq.calibration import (
    JUDGES,
    ROUNDING_IMAGES,
    WEIGHED_IMAGES,
    BlockReconstruction,
    Protection,
    compensate_rounding,
    observe_activations,
    protect_detector,
    weigh_tensors,
)
from mmdet_ptq.deploy import load_quantized_state, read_quantized, save_quantized, settle_biases
from mmdet_ptq.deploy.network.canvas import pad_to
from mmdet_ptq.engine.evaluation import dataset_meta
from mmdet_ptq.engine.global_stage.train import train_global
from mmdet_ptq.engine.run import QUANTIZED, RESULTS, Run
from mmdet_ptq.wrapping import integer_mac_share, prepare_detector


def prepare(run: Run) -> None:
    """Folds, wraps, fits weights."""

    def work() -> dict:
        weigh = functools.partial(weigh_tensors, run.detector, run.first_images(WEIGHED_IMAGES))
        run.structure = prepare_detector(run.detector, run.ptq, run.one_image(), run.run_first_images, weigh)
        return run.detector_state()

    state, _ = run.stages.run('prepare', run.inputs['prepare'], work)
    run.go_on_from(**state)
    share = integer_mac_share(run.structure)
    print_log(f'{share:.2%} of the multiply-accumulates compute in integers', 'current')


def observe(run: Run) -> None:
    """Sets activation ranges from the calibration images, and chooses the codes of weights where that is asked for."""

    def work() -> dict:
        loader, first = run.calibration_loader(), run.first_images(WEIGHED_IMAGES)
        observe_activations(run.detector, loader, run.structure, first, run.observers if run.other_blocks else None)
        if run.ptq.protect is None:
            _round(run)
        return run.detector.state_dict()

    state, _ = run.stages.run('observe', run.inputs['observe'], work)
    run.go_on_from(state)


def _round(run: Run) -> None:
    """Chooses the codes of weights, once their formats are known."""
    if run.ptq.rounding == 'compensated':
        # small batches: some of them judge what the others say
        images = min(ROUNDING_IMAGES, len(run.calibration))
        batch_size = min(run.ptq.calibration.batch_size, max(1, images // JUDGES))
        compensate_rounding(run.detector, run.first_images(images, batch_size))
        for value in run.detector.state_dict().values():
            broadcast(value)


def protect(run: Run) -> None:
    """Gives the tensors that cost most detections better formats."""

    def work() -> dict:
        measurements = run.folder / 'protect' / 'measurements.json'
        if not run.stages.resume:
            measurements.unlink(missing_ok=True)
        protection = protect_detector(
            run.detector,
            run.structure,
            run.ptq,
            list(run.first_images(run.ptq.protect.images)),
            run.calibration_loader(),
            run.stored_bytes(),
            measurements,
            run.first_images(WEIGHED_IMAGES),
        )
        _round(run)
        return dict(**run.detector_state(), protection=protection.to_dict())

    state, _ = run.stages.run('protect', run.inputs['protect'], work)
    run.go_on_from(state['model'], state['structure'])
    run.protection = Protection.from_dict(state['protection'])


def reconstruct(run: Run) -> None:
    """Brings unit after unit back to what it returned in the float detector.

    Every rank does the same with all images: units are solved one after another, each from the ones before.
    """

    def work() -> dict:
        cfg = run.ptq.reconstruct
        units = BlockReconstruction(cfg).run(
            run.detector,
            *(run.whole_loader(part) for part in run.split(cfg.holdout)),
            run.folder / 'reconstruct' / run.inputs['reconstruct'],
            run.seed,
            run.stages.resume,
        )
        for value in run.detector.state_dict().values():
            broadcast(value)
        return dict(units=units, model=run.detector.state_dict())

    state, _ = run.stages.run('reconstruct', run.inputs['reconstruct'], work)
    run.go_on_from(state['model'])
    run.units = state['units']


def minimise_global_loss(run: Run) -> None:
    """Trains all learnable quantization parameters with the filtered global loss."""

    def work() -> dict:
        train_global(run)
        return run.detector.state_dict()

    state, _ = run.stages.run('global', run.inputs['global'], work)
    run.go_on_from(state)


def write_quantized(run: Run) -> None:
    """Writes the integer checkpoint and goes on with the detector rebuilt from it."""
    path = run.folder / QUANTIZED
    settle_biases(run.detector, run.structure)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_main_process():
        for stale in (RESULTS, REPORT):  # of the checkpoint that is replaced
            (path.parent / stale).unlink(missing_ok=True)
        save_quantized(path, run.checkpoint_state())
    barrier()
    run.detector = copy.deepcopy(run.float_detector)
    load_quantized_state(run.detector, read_quantized(path))
    if run.canvas is not None:
        pad_to(run.detector, run.canvas)
    run.detector.to(run.device).eval()
    run.detector.dataset_meta = run.float_detector.dataset_meta = dataset_meta(run.evaluation_dataset())
    size, limit = path.stat().st_size, run.protection and run.protection.size_limit
    print_log(f'{path.name}: {size / 2**20:.2f} MiB', 'current')
    if limit and size > limit:
        print_log(
            f'{path.name} has {size} bytes, {size - limit:.0f} more than the budget of `ptq.protect` allows: '
            'the size was estimated; name a budget that is smaller by as much.',
            'current',
            level=logging.WARNING,
        )
