"""The stages that measure: the float row, the simulated row, the report."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.logging import print_log

from mmdet_ptq.analysis import (
    REPORT,
    bops,
    build_report,
    closing_lines,
    float_bops,
    float_size_bytes,
    new_results,
    print_lines,
    print_protection,
    print_results,
    verdict_lines,
)
from mmdet_ptq.analysis.detected.comparison import compare
from mmdet_ptq.analysis.detected.detections import DetectionPair, shown_image
from mmdet_ptq.analysis.verdict import shipped_row
from mmdet_ptq.deploy import EXACT_IMAGES, first_images_exact, get_runtime
from mmdet_ptq.deploy.network.canvas import pad_to
from mmdet_ptq.deploy.network.program import PROGRAM
from mmdet_ptq.deploy.runtime import model_files
from mmdet_ptq.engine.evaluation import check_figures, dataset_meta
from mmdet_ptq.engine.kept import kept_detections, truths_of
from mmdet_ptq.engine.run import QUANTIZED, Run
from mmdet_ptq.engine.stage_store import fingerprint
from mmdet_ptq.errors import one_line

SIMULATED = 'simulated'
# images that changed most and are shown
WORST = 5


def evaluate_float(run: Run) -> None:
    """Evaluates the float detector; a wrong checkpoint or evaluation shows before the calibration."""
    run.float_figures, _ = run.stages.run(
        'evaluate_float',
        fingerprint(run.model_inputs(), run.evaluation_inputs),
        lambda: run.evaluate_detector(run.float_detector, 'float'),
    )
    check_figures(run.float_figures, run._test_loop)


def _evaluate_padding(run: Run) -> dict[str, float]:
    """Evaluates the float detector on the canvas: what padding changes is not the quantization's."""

    def padded() -> dict:
        detector = copy.deepcopy(run.float_detector)
        pad_to(detector, run.canvas)
        return run.evaluate_detector(detector)

    inputs = fingerprint(run.model_inputs(), run.evaluation_inputs, list(run.canvas))
    found, _ = run.stages.run('evaluate_float_padded', inputs, padded)
    for key, value in found.items():
        if key in run.float_figures:
            change = value - run.float_figures[key]
            print_log(f'{key} of the float detector with padding: {value:.4f} ({change:+.4f})', 'current')
    return found


def evaluate(run: Run) -> None:
    """Evaluates the detector rebuilt from the integer checkpoint, as integer kernels compute."""
    if run.float_figures is None:
        evaluate_float(run)
    run.results = new_results(
        str(run.cfg.filename or ''),
        {**run.ptq.to_dict(), 'export': run.runtimes},
        run.seed,
        run.structure,
        run.calibration.ids,
        run.calibration.skipped,
    )
    images = len(run.evaluation_dataset())
    run.results['evaluation'] = dict(num_images=images)
    if run.ptq.dataflow is not None:
        run.results['evaluation']['exact_images'] = min(images, EXACT_IMAGES)
    if run.ptq.dataflow is not None and images > EXACT_IMAGES:
        print_log(
            f'simulated: the first {EXACT_IMAGES} of {images} images in exact integers, the others by float32 sums',
            'current',
        )
    if run.protection is not None:
        run.results['protection'] = run.protection.to_dict()
    if run.units:
        run.results['reconstruction'] = run.units
    run.add_row('float', run.float_figures, float_size_bytes(run.float_detector), float_bops(run.structure))
    if run.canvas is not None:
        run.results['canvas'] = dict(size=list(run.canvas), float_metrics=_evaluate_padding(run))
    _simulated(run, SIMULATED)


def evaluate_part(run: Run) -> None:
    """The same for a part of a run (see :meth:`.Run.part`), whose float detector is known already."""
    _simulated(run, f'{SIMULATED} for {run.ptq.export[0]}')


def _simulated(run: Run, name: str) -> None:
    def work() -> dict:
        with first_images_exact(run.detector):
            return run.evaluate_detector(run.detector, name if name == SIMULATED else None)

    row, _ = run.stages.run('evaluate_simulated', run.quantized_inputs(), work)
    run.add_row(name, row, (run.folder / QUANTIZED).stat().st_size, bops(run.structure))


def exported_models(run: Run) -> dict[str, list[Path]]:
    """Row to the files of the model that the run exported, as far as it has."""
    paths = {name: Path(run.work_dir) / name / f'model{get_runtime(name).suffix}' for name in run.runtimes}
    return {name: model_files(path) for name, path in paths.items() if path.is_file()}


def _as_typed(path: Path) -> Path:
    """A path as a person would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _first_image(run: Run) -> str | None:
    dataset = run.evaluation_dataset()
    return dataset.get_data_info(0).get('img_path') if hasattr(dataset, 'get_data_info') else None


def compared(run: Run) -> dict[str, DetectionPair] | None:
    """Compares what was kept of float and of the model to ship; adds it to the results.

    Returns:
        Captions to the images that changed most; None where nothing was kept.
    """
    timed = [row['model'] for row in run.results['rows'] if row['latency_ratio'] is not None]
    row = shipped_row(run.results, timed) or run.results['rows'][1]
    before, after = (kept_detections(run.work_dir, name) for name in ('float', row['model']))
    dataset = run.evaluation_dataset()
    truths = truths_of(dataset)
    # ids that stand for several images, as in data sets put together, tell none apart
    if not before or not after or not before.keys() == after.keys() == truths.keys() or len(truths) < len(dataset):
        return None
    found = compare(row['model'], before, after, truths, dataset_meta(dataset).get('classes') or ())
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    places = {info['img_id']: index for index, info in enumerate(infos)}
    for change in found.changed:
        change.file = Path(str(infos[places[change.image]].get('img_path', ''))).name
    run.results['comparison'] = found.to_dict()
    worst = {}
    for change in found.changed[:WORST]:
        item = dataset[places[change.image]]
        meta = item['data_samples'].metainfo
        sides = (side[change.image].scaled(meta.get('scale_factor', (1.0, 1.0))) for side in (before, after))
        named = change.file or f'image {change.image}'
        caption = f'{named}: {change.lost} lost, {change.invented} invented ({row["model"]})'
        worst[caption] = DetectionPair(shown_image(item['inputs'], meta), *sides)
    return worst


def _compared_or_told(run: Run) -> dict[str, DetectionPair] | None:
    try:
        return compared(run)
    except Exception as error:  # data sets are of any design, and what the run has measured must not be lost
        why = one_line(error)
        print_log(f'report: the detections cannot be compared ({why})', 'current', level=logging.WARNING)
        return None


def report(run: Run) -> None:
    """Writes ``results.json`` and the page, prints the table."""
    with run.stages.timed('report'):
        batches = [batch for batch, _ in zip(run._test_dataloader, range(4), strict=False)]
        if is_main_process():
            worst = _compared_or_told(run)
            build_report(run.work_dir, run.results, run.structure, run.detector, run.float_detector, batches, worst)
    run.results['remarks'] = closing_lines(run.results)
    run.write_results()
    if is_main_process():
        if run.protection is not None:
            print_protection(run.protection)
        print_results(run.results)
        models = {name: [_as_typed(path) for path in paths] for name, paths in exported_models(run).items()}
        checkpoint = _as_typed(run.folder / QUANTIZED)
        programs = {name: path for name in run.runtimes if (path := Path(run.work_dir) / name / PROGRAM).is_file()}
        programs = {name: _as_typed(path) for name, path in programs.items()}
        print_lines(verdict_lines(run.results, models, checkpoint, _first_image(run), programs))
        print_lines([f'more: {_as_typed(Path(run.work_dir) / REPORT)}'])
    print_log(f'results, integer checkpoint and report are in {run.work_dir}', 'current')
