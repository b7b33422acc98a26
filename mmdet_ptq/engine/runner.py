"""PTQRunner: a stock mmengine Runner that quantizes its detector and reports what it cost."""
from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler, pseudo_collate
from mmengine.dist import barrier, broadcast, is_main_process
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..analysis import (
    REPORT,
    bops,
    build_report,
    float_bops,
    float_size_bytes,
    new_results,
    print_protection,
    print_results,
    result_row,
    write_results,
)
from ..calibration import (
    CalibrationDataset,
    Protection,
    correct_biases,
    observe_activations,
    protect_detector,
    score_layers,
    source_datasets,
)
from ..config import PTQConfig
from ..deploy import (
    check_exportable,
    get_runtime,
    integer_arithmetic,
    load_quantized_state,
    quantized_state,
    read_quantized,
    save_quantized,
    settle_biases,
    stored_bytes,
)
from ..files import check_space, load_tensors
from ..registry import RECONSTRUCTIONS, RUNNERS
from ..wrapping import Structure, apply_structure, integer_mac_share, prepare_detector
from .arguments import runner_arguments
from .evaluation import check_evaluation, check_figures, dataset_meta, evaluation_files, evaluation_inputs, figures
from .export_stage import FLOAT_FOLDER, export_float, export_runtime, stored_files
from .float_checkpoint import load_float_checkpoint
from .global_stage import train_global
from .rehearsal import check_holdout, check_one_size, num_held_out, rehearse_global
from .stages import StageStore, file_hash, fingerprint, stage_inputs, tensor_hash

RESULTS = 'results.json'
QUANTIZED = 'quantized.pth'
# images by which channels are measured before anything is quantized
CHANNEL_IMAGES = 32


@RUNNERS.register_module()
class PTQRunner(Runner):
    """Runs post-training quantization: prepare, observe, protect, reconstruct, correct biases, global, evaluate,
    export, report.

    Everything the global stage needs (loop, optimizer wrapper, schedulers, checkpoints, logging, visualizer back
    ends) is mmengine's own; the user's training loop, optimizer and custom hooks are not touched and not used.

    Args:
        model: The detector, or its config.
        work_dir: Where everything goes.
        ptq: The ``ptq`` block.
        calibration: Calibration images; by default drawn as the block says.
        **kwargs: mmengine Runner's arguments (test dataloader and evaluator, launcher, ...).

    Attributes:
        detector: The detector in its present state: float, quantized, loaded from the integer checkpoint.
        float_detector: The untouched float detector.
        structure: The quantized detector's structure, after ``prepare``.
        inputs: Calibration stage to the hash of all that it depends on, see :func:`.stages.stage_inputs`.
        protection: What protection did, if there was any.
        units: What reconstruction did to each unit.
        results: What ``results.json`` holds.
    """

    def __init__(self, model: nn.Module | dict, work_dir: str, ptq: PTQConfig | dict,
                 calibration: Dataset | None = None, **kwargs) -> None:
        self.ptq = ptq if isinstance(ptq, PTQConfig) else PTQConfig.from_dict(ptq)
        self._calibration = calibration
        resume, load_from = kwargs.pop('resume', False), kwargs.pop('load_from', None)
        randomness = dict(kwargs.pop('randomness', None) or {})
        if randomness.get('seed') is None:
            # mmengine would draw another seed in every run, and nothing could be resumed
            randomness['seed'] = self.ptq.calibration.seed
        randomness['diff_rank_seed'] = False  # all ranks calibrate one detector
        for name in self.ptq.export:
            get_runtime(name)
        check_space(work_dir, 0)
        super().__init__(model=model, work_dir=work_dir, randomness=randomness, **kwargs)
        # checkpoints are loaded here, with checks, not by mmengine's lenient loader
        self._has_loaded = True
        self.checkpoint = load_from
        self.stages = StageStore(work_dir, resume)
        self.detector: nn.Module = self._inner(self.model).eval()
        self.float_detector: nn.Module | None = None
        self.structure: Structure | None = None
        self.inputs: dict[str, str] = {}
        self.protection: Protection | None = None
        self.units: list[dict] = []
        self.results: dict = {}
        self._float_figures: dict[str, float] | None = None

    @classmethod
    def from_cfg(cls, cfg: Config) -> PTQRunner:
        """Builds the runner from any mmdet config with a ``ptq`` block.

        Args:
            cfg: The config. ``load_from`` names the float checkpoint, ``resume`` takes finished stages over.

        Raises:
            PTQError: The block is wrong, or no checkpoint is named.
        """
        return cls(**runner_arguments(cfg))

    def run(self) -> dict:
        """Runs every stage.

        Returns:
            What ``results.json`` holds.
        """
        self.begin()
        self.evaluate_float()
        self.calibrate()
        self.evaluate()
        self.export()
        self.report()
        return self.results

    def begin(self) -> None:
        """Checks all that can be checked before the calibration, and exports the float detector."""
        check_space(self.work_dir, 6 * float_size_bytes(self.detector))
        for name in self.ptq.export:
            check_exportable(self.detector)
            get_runtime(name).check()
            get_runtime(name).check_export()
        self.load()
        if self.ptq.export:
            check_one_size(self._tensor_shape(first)[2:] for first in self.calibration.sizes.values())
        if self.ptq.reconstruct is not None:
            check_holdout('ptq.reconstruct', self.ptq.reconstruct.holdout, len(self.calibration))
        if self.ptq.global_loss is not None:
            rehearse_global(self.ptq.global_loss, len(self.calibration))
        self.export_float()

    def calibrate(self) -> nn.Module:
        """Runs the stages up to the integer checkpoint.

        Returns:
            The detector rebuilt from the integer checkpoint.
        """
        if self.float_detector is None:
            self.begin()
        self.prepare()
        for name in self.ptq.export:
            get_runtime(name).check_formats(self.structure)
        self.observe()
        if self.ptq.protect is not None:
            self.protect()
        if self.ptq.reconstruct is not None:
            self.reconstruct()
        if self.ptq.bias_correction:
            self.correct_biases()
        if self.ptq.global_loss is not None:
            self.minimise_global_loss()
        self._save_quantized()
        return self.detector

    @property
    def calibration(self) -> CalibrationDataset:
        """The calibration images, read on first use."""
        if self._calibration is None:
            cfg, loss = self.ptq.calibration, self.ptq.global_loss
            annotated = loss is not None and loss.target == 'ground_truth'
            self._calibration = CalibrationDataset(
                source_datasets(self.cfg, cfg, annotated), cfg.num_images, cfg.seed, self._evaluation_dataset())
        return self._calibration

    def load(self) -> None:
        """Loads the float checkpoint, checks the evaluation and reads the calibration images."""
        if self.checkpoint is not None:
            load_float_checkpoint(self.detector, self.checkpoint)
        if self._test_loop is not None:
            self._check_evaluation()
        self.float_detector = copy.deepcopy(self.detector)
        self.inputs = stage_inputs(
            self.ptq.to_dict(), self._model_inputs(), [str(i) for i in self.calibration.ids], self.calibration.content,
            self.seed)

    def prepare(self) -> None:
        """Folds, equalizes, wraps, fits weights."""

        def work() -> dict:
            self.structure = prepare_detector(self.detector, self.ptq, self._one_image(), self._run_first_images)
            return self._state()

        self._take_over(*self.stages.run('prepare', self.inputs['prepare'], work))
        share = integer_mac_share(self.structure)
        print_log(f'{share:.2%} of the multiply-accumulates compute in integers', 'current')

    def observe(self) -> None:
        """Sets activation ranges from the calibration images."""

        def work() -> dict:
            observe_activations(self.detector, self.calibration_loader(), self.structure)
            return self.detector.state_dict()

        state, taken_over = self.stages.run('observe', self.inputs['observe'], work)
        if taken_over:
            self._load(state)

    def protect(self) -> None:
        """Gives the tensors that cost most detections better formats."""

        def work() -> dict:
            measurements = Path(self.work_dir) / 'protect' / 'measurements.json'
            if not self.stages.resume:
                measurements.unlink(missing_ok=True)
            protection = protect_detector(
                self.detector, self.structure, self.ptq, list(self.first_images(self.ptq.protect.images)),
                self.calibration_loader(), self.stored_bytes(), measurements)
            return dict(**self._state(), protection=protection.to_dict())

        state, taken_over = self.stages.run('protect', self.inputs['protect'], work)
        self._take_over(state, taken_over)
        self.protection = Protection.from_dict(state['protection'])

    def reconstruct(self) -> None:
        """Brings unit after unit back to what it returned in the float detector.

        Every rank does the same with all images: units are solved one after another, each from the ones before.
        """

        def work() -> dict:
            cfg = self.ptq.reconstruct
            method = RECONSTRUCTIONS.get(cfg.type)(cfg)
            units = method.run(
                self.detector, *(self._same_loader(part) for part in self.split(cfg.holdout)),
                Path(self.work_dir) / 'reconstruct' / self.inputs['reconstruct'], self.seed, self.stages.resume)
            for value in self.detector.state_dict().values():
                broadcast(value)
            return dict(units=units, model=self.detector.state_dict())

        state, taken_over = self.stages.run('reconstruct', self.inputs['reconstruct'], work)
        if taken_over:
            self._load(state['model'])
        self.units = state['units']

    def correct_biases(self) -> None:
        """Lets the biases take back what quantization shifts on average.

        After reconstruction, whose target is the float output with the biases that the detector has then.
        """

        def work() -> dict:
            scores = score_layers(self.detector, self.structure, next(iter(self.first_images(1))))
            correct_biases(self.detector, self.calibration_loader(), self.structure, self._prepared(), scores)
            return self._state()

        self._take_over(*self.stages.run('bias_correction', self.inputs['bias_correction'], work))

    def minimise_global_loss(self) -> None:
        """Trains all learnable quantization parameters with the filtered global loss."""

        def work() -> dict:
            train_global(self)
            return self.detector.state_dict()

        state, taken_over = self.stages.run('global', self.inputs['global'], work)
        if taken_over:
            self._load(state)

    def evaluate_float(self) -> None:
        """Evaluates the float detector; a wrong checkpoint or evaluation shows before the calibration."""
        self._float_figures, _ = self.stages.run(
            'evaluate_float', fingerprint(self._model_inputs(), self._evaluation_inputs),
            lambda: self.evaluate_detector(self.float_detector))
        check_figures(self._float_figures, self._test_loop)

    def evaluate(self) -> None:
        """Evaluates the detector rebuilt from the integer checkpoint, as integer kernels compute."""
        if self._float_figures is None:
            self.evaluate_float()
        self.results = new_results(
            str(self.cfg.filename or ''), self.ptq.to_dict(), self.seed, self.structure, self.calibration.ids,
            self.calibration.skipped)
        if self.protection is not None:
            self.results['protection'] = self.protection.to_dict()
        if self.units:
            self.results['reconstruction'] = self.units
        self._row('float', self._float_figures, float_size_bytes(self.float_detector), float_bops(self.structure))
        quantized = Path(self.work_dir) / QUANTIZED

        def simulated() -> dict:
            with integer_arithmetic(self.detector):
                return self.evaluate_detector(self.detector)

        row, _ = self.stages.run('evaluate_simulated', self._quantized_inputs(), simulated)
        self._row('simulated', row, quantized.stat().st_size, bops(self.structure))

    def export(self) -> None:
        """Exports to every runtime of ``ptq.export``, evaluates the models there and times them."""
        for name in self.ptq.export:
            inputs = fingerprint(self._quantized_inputs(), name, self.input_shape)
            row = self._exported(f'export_{name}', inputs, Path(name), lambda name=name: export_runtime(self, name))
            self.results.setdefault('runtimes', {})[name] = dict(integer=row['integer'], float=row['float'])
            self._row(name, row['metrics'], row['size_bytes'], bops(self.structure), row['latency_ratio'],
                      row.get('remark', ''))

    def export_float(self) -> None:
        """Exports the float detector to every runtime of ``ptq.export``, before anything that takes long."""
        for name in self.ptq.export:
            self._exported(
                f'export_{name}_float', fingerprint(self.inputs['prepare'], name, self.input_shape),
                Path(name) / FLOAT_FOLDER, lambda name=name: export_float(self, name))

    def _exported(self, stage: str, inputs: str, folder: Path, work: Callable[[], dict]) -> dict:
        """Runs a stage that writes a model; it is taken over only while its files are there."""
        state, taken_over = self.stages.run(stage, inputs, work)
        if taken_over and state.get('files') != stored_files(Path(self.work_dir) / folder):
            print_log(f'stage {stage}: the model in {folder} is gone or another one; it runs again', 'current')
            self.stages.path(stage).unlink(missing_ok=True)
            state, _ = self.stages.run(stage, inputs, work)
        return state

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of the tensor that exported models take: one image as the test pipeline gives it."""
        return self._tensor_shape(0)

    def _tensor_shape(self, position: int) -> tuple[int, int, int, int]:
        batch = pseudo_collate([self.calibration[position]])
        return tuple(self.detector.data_preprocessor(batch, False)['inputs'].shape)

    def report(self) -> None:
        """Writes ``results.json`` and the page, prints the table."""
        with self.stages.timed('report'):
            batches = [batch for batch, _ in zip(self._test_dataloader, range(4), strict=False)]
            if is_main_process():
                # layer by layer, the detector compares with equalized weights
                reference = self.float_detector if self.ptq.equalize is None else self._prepared()
                build_report(self.work_dir, self.results, self.structure, self.detector, reference, batches)
        self._write_results()
        if is_main_process():
            if self.protection is not None:
                print_protection(self.protection)
            print_results(self.results)
        print_log(f'results, integer checkpoint and report are in {self.work_dir}', 'current')

    def _check_evaluation(self) -> None:
        """Builds the evaluation's data and metrics before anything that takes long."""
        if not isinstance(self._test_loop, BaseLoop):
            with evaluation_files():
                self._test_loop = self.build_test_loop(self._test_loop)
            check_evaluation(self._test_loop, self.detector)
            self._test_dataloader = self._test_loop.dataloader

    def _one_image(self) -> Callable[[], Any]:
        data = self.detector.data_preprocessor(next(iter(self.first_images(1))), False)
        return lambda: self.detector(**copy.deepcopy(data), mode='predict')

    @torch.no_grad()
    def _run_first_images(self) -> None:
        for batch in self.first_images(CHANNEL_IMAGES):
            self.detector(**self.detector.data_preprocessor(batch, False), mode='predict')

    def first_images(self, count: int) -> DataLoader:
        """Batches of the first calibration images, the same ones on every rank."""
        return self._same_loader(self.calibration.part(range(min(count, len(self.calibration)))))

    def _same_loader(self, dataset: Dataset) -> DataLoader:
        return DataLoader(dataset, self.ptq.calibration.batch_size, collate_fn=pseudo_collate)

    def split(self, holdout: float) -> tuple[Dataset, Dataset]:
        """The calibration images that are trained on and those that are held out, which may be none."""
        # the draw is random already: its last images are as good as any
        train = len(self.calibration) - num_held_out(holdout, len(self.calibration))
        return self.calibration.part(range(train)), self.calibration.part(range(train, len(self.calibration)))

    def calibration_loader(self) -> DataLoader:
        """Batches of all calibration images, each rank its share."""
        return self.images_loader(self.calibration, self.ptq.calibration.batch_size)

    def images_loader(self, dataset: Dataset, batch_size: int, infinite: bool = False) -> DataLoader:
        # built here, not from a config: mmengine would deep-copy the decoded images
        sampler = InfiniteSampler(dataset, seed=self.seed) if infinite else DefaultSampler(dataset, shuffle=False)
        return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=pseudo_collate)

    def _save_quantized(self) -> None:
        """Writes the integer checkpoint and goes on with the detector rebuilt from it."""
        path = Path(self.work_dir) / QUANTIZED
        settle_biases(self.detector, self.structure)
        if is_main_process():
            for stale in (RESULTS, REPORT):  # of the checkpoint that is replaced
                (path.parent / stale).unlink(missing_ok=True)
            save_quantized(path, self._quantized_state())
        barrier()
        self.detector = copy.deepcopy(self.float_detector)
        load_quantized_state(self.detector, read_quantized(path))
        self.detector.to(self._device).eval()
        self.detector.dataset_meta = self.float_detector.dataset_meta = dataset_meta(self._evaluation_dataset())
        size, limit = path.stat().st_size, self.protection and self.protection.size_limit
        print_log(f'{path.name}: {size / 2**20:.2f} MiB', 'current')
        if limit and size > limit:
            print_log(f'{path.name} has {size} bytes, {size - limit:.0f} more than the budget of `ptq.protect` allows: '
                      'the size was estimated; name a budget that is smaller by as much.', 'current', level=30)

    def stored_bytes(self) -> int:
        """Size of the integer checkpoint as it would be written now."""
        return stored_bytes(self._quantized_state())

    def _quantized_state(self) -> dict:
        # where and how often it was run is no part of the detector: a resumed run writes the same file
        config = {key: value for key, value in self.cfg.to_dict().items() if key not in ('work_dir', 'resume')}
        meta = dataset_meta(self._evaluation_dataset())
        return quantized_state(self.detector, self.structure, config, meta, self.input_shape)

    def evaluate_detector(self, detector: nn.Module) -> dict[str, float]:
        """Every figure of the config's evaluator for a detector."""
        self.model = self.wrap_model(self.cfg.get('model_wrapper_cfg'), detector)
        return figures(self.test())

    def _row(self, model: str, metrics: dict, size: int, operations: int, latency_ratio: float | None = None,
             remark: str = '') -> None:
        self.results['rows'].append(result_row(model, metrics, size, operations, latency_ratio, remark))
        self._write_results()

    def _write_results(self) -> None:
        self.results['stages'] = {name: dict(seconds=seconds) for name, seconds in self.stages.seconds.items()}
        if is_main_process():
            write_results(Path(self.work_dir) / RESULTS, self.results)

    def _evaluation_dataset(self) -> Dataset | None:
        if self._test_loop is None:
            return None
        self._check_evaluation()
        return self._test_dataloader.dataset

    def _model_inputs(self) -> list[str]:
        """What the float detector depends on."""
        known = self.checkpoint is not None and Path(self.checkpoint).is_file()
        return [str(self.cfg.get('model')), str(self.cfg.get('data_preprocessor')),
                file_hash(self.checkpoint) if known else str(self.checkpoint)]

    def _quantized_inputs(self) -> str:
        """Hash of the quantized detector and of what it is evaluated on."""
        return fingerprint(self.inputs['global'], self._evaluation_inputs, tensor_hash(self.detector.state_dict()))

    @cached_property
    def _evaluation_inputs(self) -> str:
        return evaluation_inputs(self.cfg, self._evaluation_dataset())

    def _state(self) -> dict:
        return dict(structure=self.structure.to_dict(), model=self.detector.state_dict())

    def _built(self, state: dict) -> tuple[nn.Module, Structure]:
        """The detector of a stage's :meth:`_state`, and its structure."""
        detector, structure = copy.deepcopy(self.float_detector), Structure.from_dict(state['structure'])
        apply_structure(detector, structure)
        detector.load_state_dict(state['model'])
        return detector.to(self._device), structure

    def _prepared(self) -> nn.Module:
        """The detector as prepare left it: in float mode, the float detector with folded, equalized weights."""
        return self._built(load_tensors(self.stages.path('prepare'))['state'])[0]

    def _take_over(self, state: dict, taken_over: bool) -> None:
        if taken_over:
            self.detector, self.structure = self._built(state)

    def _load(self, state: dict) -> None:
        self.detector.load_state_dict(state)
        self.detector.to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @staticmethod
    def _inner(model: nn.Module) -> nn.Module:
        return model.module if is_model_wrapper(model) else model
