"""What a run has loaded, and where it stores it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler, pseudo_collate
from mmengine.device import get_device
from mmengine.dist import all_gather_object, is_main_process
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmdet_ptq.analysis import result_row, write_results
from mmdet_ptq.calibration import CalibrationDataset, Protection, source_datasets
from mmdet_ptq.compat import start_without_gpu
from mmdet_ptq.config import DYNAMIC, PTQConfig, check_seed
from mmdet_ptq.deploy import get_runtime, quantized_state, stored_bytes
from mmdet_ptq.deploy.network.canvas import canvas_of, check_canvas, open_divisor
from mmdet_ptq.engine.arguments import runner_arguments
from mmdet_ptq.engine.evaluation import (
    LoggedRunner,
    build_evaluation,
    check_evaluation,
    dataset_meta,
    evaluation_inputs,
    figures,
    image_sizes,
    naming_images,
)
from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.engine.kept import keeping
from mmdet_ptq.engine.stage_store import fingerprint, stage_inputs, tensor_hash
from mmdet_ptq.engine.told import ToldStages
from mmdet_ptq.engine.work_dir import take_work_dir
from mmdet_ptq.errors import PTQError, building
from mmdet_ptq.files import check_space, file_hash
from mmdet_ptq.predictions import check_no_tracker
from mmdet_ptq.quantizers import Observer
from mmdet_ptq.wrapping import Structure, apply_structure
from mmdet_ptq.wrapping.watching.tensors import deep_copy

RESULTS = 'results.json'
QUANTIZED = 'quantized.pth'
# keys of a config that say where and how often it was run
HOW_IT_RAN = ('work_dir', 'resume', 'launcher', 'experiment_name')
# images by which channels are measured before anything is quantized
CHANNEL_IMAGES = 32


class Run(LoggedRunner):
    """A detector to be quantized, what it is calibrated and evaluated on, and where a run keeps what it has done.

    A stock mmengine Runner; the stages (:mod:`mmdet_ptq.engine.stages`) work on it.

    Args:
        model: The detector, or its config.
        work_dir: Where everything goes.
        ptq: The ``ptq`` block.
        calibration: Calibration images; by default drawn as the block says.
        **kwargs: mmengine Runner's arguments (test dataloader and evaluator, launcher, ...).

    Attributes:
        model: The untouched float detector once it is loaded; mmengine's evaluation finds another one here.
        detector: The detector in its present state: float, quantized, loaded from the integer checkpoint.
        float_detector: The untouched float detector.
        structure: The quantized detector's structure, after ``prepare``.
        inputs: Calibration stage to the hash of all that it depends on, see :func:`.stage_store.stage_inputs`.
        protection: What protection did, if there was any.
        units: What reconstruction did to each unit.
        results: What ``results.json`` holds.
        folder: Where its integer checkpoint goes.
        runtimes: All that are exported to.
        observers: What was observed, for a part that observes the same.
        canvas: Height and width that images of several sizes are padded to; None where they have one or nothing is
            exported.
        largest: Height and width that hold each image, where exported models take any; None where they take one.
        divisor: What heights and widths are multiples of, where exported models take any; else 0.
    """

    def __init__(
        self,
        model: nn.Module | dict,
        work_dir: str,
        ptq: PTQConfig | dict,
        calibration: Dataset | None = None,
        **kwargs,
    ) -> None:
        ptq = ptq if isinstance(ptq, PTQConfig) else PTQConfig.from_dict(ptq)
        # what the runtimes have in common is done with the first of them; the others follow, see `part`
        self.ptq, *self.other_blocks = ptq.by_runtime()
        self.runtimes = list(ptq.export)
        self._calibration = calibration
        resume, load_from = kwargs.pop('resume', False), kwargs.pop('load_from', None)
        randomness = dict(kwargs.pop('randomness', None) or {})
        if randomness.get('seed') is None:
            # mmengine would draw another seed in every run, and nothing could be resumed
            randomness['seed'] = self.ptq.calibration.seed
        randomness['diff_rank_seed'] = False  # all ranks calibrate one detector
        for name in self.runtimes:
            get_runtime(name)
        check_space(work_dir, 0)
        check_seed('randomness.seed', randomness['seed'])
        check_no_tracker(model)
        with building(dict(model=model, **{key: value for key, value in kwargs.items() if key != 'cfg'})):
            super().__init__(model=model, work_dir=work_dir, randomness=randomness, **kwargs)
        # checkpoints are loaded here, with checks, not by mmengine's lenient loader
        self._has_loaded = True
        self.checkpoint = load_from
        self.stages = ToldStages(work_dir, resume)
        self.folder = Path(work_dir)
        self.observers: dict[str, Observer] = {}
        self.detector: nn.Module = unwrapped(self.model)
        self.detector.eval()
        self.float_detector: nn.Module | None = None
        self.structure: Structure | None = None
        self.inputs: dict[str, str] = {}
        self.protection: Protection | None = None
        self.units: list[dict] = []
        self.results: dict = {}
        self.float_figures: dict[str, float] | None = None
        self.canvas: tuple[int, int] | None = None
        self.largest: tuple[int, int] | None = None
        self.divisor = 0

    @classmethod
    def from_cfg(cls, cfg: Config) -> Run:
        """Builds the runner from any mmdet config with a ``ptq`` block.

        Args:
            cfg: The config. ``load_from`` names the float checkpoint, ``resume`` takes finished stages over.

        Raises:
            PTQError: The block is wrong, or no checkpoint is named.
        """
        return cls(**runner_arguments(cfg))

    def setup_env(self, env_cfg: dict) -> None:
        """As mmengine, and on machines without an accelerator, too; takes the work directory.

        Raises:
            PTQError: Another process has it.
        """
        if self.distributed:
            start_without_gpu(self.launcher)
        super().setup_env(env_cfg)
        # before anything is written
        if is_main_process():
            take_work_dir(self.work_dir)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """The detector as it is, on its device: it is the global stage's that is trained by all ranks together."""
        return super().wrap_model(model_wrapper_cfg, model) if not self.distributed else model.to(get_device())

    @property
    def calibration(self) -> CalibrationDataset:
        """The calibration images, read on first use."""
        if self._calibration is None:
            cfg, loss = self.ptq.calibration, self.ptq.global_loss
            annotated = loss is not None and loss.target == 'ground_truth'
            self._calibration = CalibrationDataset(
                source_datasets(self.cfg, cfg, annotated), cfg.num_images, cfg.seed, self.evaluation_dataset()
            )
        return self._calibration

    def load(self) -> None:
        """Loads the float checkpoint, checks the evaluation and reads the calibration images."""
        if self.checkpoint is not None:
            load_float_checkpoint(self.detector, self.checkpoint)
        if self._test_loop is not None:
            self.check_evaluation()
        # `detector` is quantized in place
        self.model = self.float_detector = deep_copy(self.detector)
        self.inputs = self.stage_inputs()
        self.check_agreement()

    def check_agreement(self) -> None:
        """Compares the processes of a run: of different ones each would wait for what the others never do.

        Raises:
            PTQError: They were started otherwise, or see other files.
        """
        mine = {
            'the work directory': str(self.folder.resolve()),
            '--resume': self.stages.resume,
            'the seed': self.seed,
            'the `ptq` block': fingerprint(self.ptq.to_dict(), self.runtimes),
            'the model or its checkpoint': fingerprint(self.model_inputs()),
            'the calibration images that it could not read': self.calibration.skipped,
            'the calibration images': self.calibration.content,
            'the number of evaluation images': len(self.evaluation_dataset() or ()),
        }
        first, *others = all_gather_object(mine)
        for rank, theirs in enumerate(others, 1):
            what = next((what for what, value in theirs.items() if value != first[what]), None)
            if what is not None:
                raise PTQError(
                    f'process 0 and process {rank} of this run differ in {what}: {first[what]!s:.100} and '
                    f'{theirs[what]!s:.100}; start all by the same command, with the same files.'
                )

    def stage_inputs(self) -> dict[str, str]:
        """See :func:`.stage_store.stage_inputs`."""
        images = [str(i) for i in self.calibration.ids]
        return stage_inputs(self.ptq.to_dict(), self.model_inputs(), images, self.calibration.content, self.seed)

    def part(self, block: PTQConfig) -> Run:
        """The same run for runtimes that are calibrated otherwise: from the float detector, in a folder of its own.

        Args:
            block: One of ``other_blocks``.
        """
        part, name = copy.copy(self), block.export[0]
        part.ptq, part.folder, part.stages = block, self.folder / name, self.stages.within(name)
        part.detector, part.structure, part.protection, part.units = copy.deepcopy(self.float_detector), None, None, []
        part.inputs = part.stage_inputs()
        return part

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of the tensor that exported models take: one image, on the canvas where there is one."""
        batch = pseudo_collate([self.calibration[0]])
        shape = tuple(self.detector.data_preprocessor(batch, False)['inputs'].shape)
        size = self.canvas or self.largest
        return shape if size is None else (*shape[:2], *size)

    @property
    def export_options(self) -> dict[str, int]:
        """What runtimes are told besides the shape."""
        return dict(dynamic_size=self.divisor) if self.divisor else {}

    def choose_canvas(self) -> None:
        """Chooses the canvas on which quantized and exported detectors see images of several sizes, and says so.

        Raises:
            PTQError: ``ptq.export_size`` does not hold an image.
        """
        sizes = {*self.calibration.sizes, *image_sizes(self.evaluation_dataset())}
        if self.ptq.export_size == DYNAMIC:
            self.largest, self.divisor = canvas_of(self.detector, sizes), open_divisor(self.detector, sizes)
            print_log(
                f'images have {len(sizes)} size{"s" * (len(sizes) > 1)}: exported models take any whose height and '
                f'width are multiples of {self.divisor}; they are timed at '
                f'{self.largest[0]}x{self.largest[1]} (height x width)',
                'current',
            )
            return
        if self.ptq.export_size is not None:
            check_canvas(self.ptq.export_size, sizes)
        elif len(sizes) == 1:
            return
        self.canvas = self.ptq.export_size or canvas_of(self.detector, sizes)
        print_log(
            f'images have {len(sizes)} sizes: exported models take {self.canvas[0]}x{self.canvas[1]} (height x width), '
            'to which every image is padded at the right and below; the simulated row is made so, too, the float '
            'row as mmdet does (`ptq.export_size` chooses another size)',
            'current',
        )

    def one_image(self) -> Callable[[], Any]:
        """Calls the detector on the first calibration image."""
        data = self.detector.data_preprocessor(next(iter(self.first_images(1))), False)
        return lambda: self.detector(**copy.deepcopy(data), mode='predict')

    @torch.no_grad()
    def run_first_images(self) -> None:
        """Calls the detector on the first calibration images."""
        for batch in self.first_images(CHANNEL_IMAGES):
            self.detector(**self.detector.data_preprocessor(batch, False), mode='predict')

    def first_images(self, count: int, batch_size: int | None = None) -> DataLoader:
        """Batches of the first calibration images, the same ones on every rank."""
        return self.whole_loader(self.calibration.part(range(min(count, len(self.calibration)))), batch_size)

    def whole_loader(self, dataset: Dataset, batch_size: int | None = None) -> DataLoader:
        """Batches of a data set, all of it on every rank, by default of ``ptq.calibration.batch_size``."""
        return DataLoader(dataset, batch_size or self.ptq.calibration.batch_size, collate_fn=pseudo_collate)

    def split(self, holdout: float) -> tuple[Dataset, Dataset]:
        """The calibration images that are trained on and those that are held out, which may be none."""
        # the draw is random already: its last images are as good as any
        train = len(self.calibration) - num_held_out(holdout, len(self.calibration))
        return self.calibration.part(range(train)), self.calibration.part(range(train, len(self.calibration)))

    def calibration_loader(self) -> DataLoader:
        """Batches of all calibration images, on every rank."""
        return self.whole_loader(self.calibration)

    def endless_loader(self, dataset: Dataset, batch_size: int) -> DataLoader:
        """Shuffled batches of a data set without an end; ranks share a batch, as far as its images go round."""
        # built here, not from a config: mmengine would deep-copy the decoded images
        sampler = InfiniteSampler(dataset, seed=self.seed)
        return DataLoader(dataset, -(-batch_size // self.world_size), sampler=sampler, collate_fn=pseudo_collate)

    def stored_bytes(self) -> int:
        """Size of the integer checkpoint as it would be written now."""
        return stored_bytes(self.checkpoint_state())

    def checkpoint_state(self) -> dict:
        """What the integer checkpoint holds."""
        # where and how often it was run is no part of the detector: a resumed run writes the same file
        config = {key: value for key, value in self.cfg.to_dict().items() if key not in HOW_IT_RAN}
        meta = dataset_meta(self.evaluation_dataset())
        return quantized_state(self.detector, self.structure, config, meta, self.input_shape, self.canvas is not None)

    def evaluate_detector(self, detector: nn.Module, row: str | None = None) -> dict[str, float]:
        """Every figure of the config's evaluator for a detector.

        Args:
            detector: The detector.
            row: Its row, under which what it finds is kept for the report. Defaults to None: it is not kept.
        """
        # of a part, too: the loop knows the runner that it was built for
        runner = self._test_loop.runner if isinstance(self._test_loop, BaseLoop) else self
        evaluated = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), detector)
        self.check_evaluation()
        evaluator = getattr(self._test_loop, 'evaluator', None)
        kept = keeping(evaluator, self.work_dir, row) if row else nullcontext()
        with mock.patch.object(runner, 'model', evaluated), kept, naming_images(self._test_loop):
            return figures(runner.test())

    def add_row(
        self,
        model: str,
        metrics: dict,
        size: int,
        operations: int,
        latency_ratio: float | None = None,
        remark: str = '',
        latency: dict | None = None,
    ) -> None:
        """Adds a row to the results."""
        self.results['rows'].append(result_row(model, metrics, size, operations, latency_ratio, remark, latency))
        self.write_results()

    def write_results(self) -> None:
        """Writes ``results.json`` as far as it is."""
        self.results['stages'] = {name: dict(seconds=seconds) for name, seconds in self.stages.seconds.items()}
        if is_main_process():
            write_results(Path(self.work_dir) / RESULTS, self.results)

    def evaluation_dataset(self) -> Dataset | None:
        """The data set of the evaluation; None without one."""
        if self._test_loop is None:
            return None
        self.check_evaluation()
        return self._test_dataloader.dataset

    def check_evaluation(self) -> None:
        """Builds the evaluation's data and metrics before anything that takes long."""
        if not isinstance(self._test_loop, BaseLoop):
            cfg = dict(test_dataloader=self._test_dataloader, test_evaluator=self._test_evaluator)
            self._test_loop = build_evaluation(cfg, lambda: self.build_test_loop(self._test_loop))
            check_evaluation(self._test_loop, self.detector)
            self._test_dataloader = self._test_loop.dataloader

    def model_inputs(self) -> list[str]:
        """What the float detector depends on."""
        known = self.checkpoint is not None and Path(self.checkpoint).is_file()
        return [
            str(self.cfg.get('model')),
            str(self.cfg.get('data_preprocessor')),
            file_hash(self.checkpoint) if known else str(self.checkpoint),
        ]

    def quantized_inputs(self) -> str:
        """Hash of the quantized detector and of what it is evaluated on."""
        return fingerprint(
            self.inputs['global'], self.evaluation_inputs, str(self.canvas), tensor_hash(self.detector.state_dict())
        )

    @cached_property
    def evaluation_inputs(self) -> str:
        """Hash of what the evaluation depends on."""
        return evaluation_inputs(self.cfg, self.evaluation_dataset())

    def detector_state(self) -> dict:
        """The quantized detector and its structure."""
        return dict(structure=self.structure.to_dict(), model=self.detector.state_dict())

    def go_on_from(self, model: dict, structure: dict | None = None) -> None:
        """Goes on with the detector that a stage left, built anew: a run that is resumed here does the same.

        Args:
            model: Its state.
            structure: Its structure, if the stage changed it.
        """
        if structure is not None:
            self.structure = Structure.from_dict(structure)
        detector = copy.deepcopy(self.float_detector)
        apply_structure(detector, self.structure)
        detector.load_state_dict(model)
        self.detector = detector.to(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without the wrapper that distributes it, if it has one."""
    return model.module if is_model_wrapper(model) else model


def num_held_out(share: float, images: int) -> int:
    """How many of the calibration images are not trained on.

    Args:
        share: ``holdout`` of a section.
        images: Number of calibration images.
    """
    return round(images * share)
