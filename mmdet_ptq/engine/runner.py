"""PTQRunner: a stock mmengine Runner that quantizes its detector and reports what it cost."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler, pseudo_collate
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..analysis import (
    bops,
    build_report,
    float_bops,
    float_size_bytes,
    new_results,
    print_results,
    result_row,
    write_results,
)
from ..calibration import CalibrationDataset, FilteredGlobalLoss, observe_activations, source_datasets
from ..compat import replace_sync_bn
from ..config import GlobalLossConfig, PTQConfig
from ..deploy import load_quantized_state, quantized_state, read_quantized, save_quantized
from ..errors import PTQError
from ..files import check_space
from ..registry import RECONSTRUCTIONS, RUNNERS
from ..wrapping import Structure, apply_structure, integer_mac_share, prepare_detector
from .evaluation import evaluation_files, evaluation_hooks
from .float_checkpoint import load_float_checkpoint
from .global_stage import GlobalLossModel
from .optim import train_only_quantization
from .stages import StageStore, file_hash, fingerprint, latest_checkpoint, tensor_hash

RESULTS = 'results.json'
QUANTIZED = 'quantized.pth'


@RUNNERS.register_module()
class PTQRunner(Runner):
    """Runs post-training quantization: prepare, observe, reconstruct, global, evaluate, report.

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
        inputs: Hash of all that prepare and observe depend on.
        reconstruct_inputs: The same for reconstruction.
        global_inputs: The same for the global stage.
        units: What reconstruction did to each unit.
        results: What ``results.json`` holds.
    """

    def __init__(self, model: nn.Module | dict, work_dir: str, ptq: PTQConfig | dict,
                 calibration: Dataset | None = None, **kwargs) -> None:
        self.ptq = ptq if isinstance(ptq, PTQConfig) else PTQConfig.from_dict(ptq)
        self._calibration = calibration
        resume, load_from = kwargs.pop('resume', False), kwargs.pop('load_from', None)
        check_space(work_dir, 0)
        super().__init__(model=model, work_dir=work_dir, **kwargs)
        # checkpoints are loaded here, with checks, not by mmengine's lenient loader
        self._has_loaded = True
        self.checkpoint = load_from
        self.stages = StageStore(work_dir, resume)
        self.detector: nn.Module = self._inner(self.model).eval()
        self.float_detector: nn.Module | None = None
        self.structure: Structure | None = None
        self.inputs = self.reconstruct_inputs = self.global_inputs = ''
        self.units: list[dict] = []
        self.results: dict = {}

    @classmethod
    def from_cfg(cls, cfg: Config) -> PTQRunner:
        """Builds the runner from any mmdet config with a ``ptq`` block.

        Args:
            cfg: The config. ``load_from`` names the float checkpoint, ``resume`` takes finished stages over.

        Raises:
            PTQError: The block is wrong, or no checkpoint is named.
        """
        ptq = PTQConfig.from_dict(cfg.get('ptq'))
        if not cfg.get('load_from'):
            raise PTQError('no float checkpoint is named; give CHECKPOINT on the command line or set `load_from`.')
        cfg = copy.deepcopy(cfg)
        replace_sync_bn(cfg['model'])
        dropped = [hook['type'] if isinstance(hook, dict) else type(hook).__name__
                   for hook in cfg.get('custom_hooks') or []]
        if dropped:
            print_log(f'custom_hooks belong to training and are not used: {", ".join(map(str, dropped))}', 'current')
        for key in ('test_dataloader', 'test_evaluator'):
            if cfg.get(key) is None:
                raise PTQError(f'the config has no `{key}`, which the report is made with.')
        return cls(
            model=cfg['model'], work_dir=cfg['work_dir'], ptq=ptq,
            test_dataloader=cfg['test_dataloader'], test_evaluator=cfg['test_evaluator'],
            test_cfg=cfg.get('test_cfg') or dict(type='TestLoop'),
            default_hooks=evaluation_hooks(cfg.get('default_hooks')),
            data_preprocessor=cfg.get('data_preprocessor'), load_from=cfg['load_from'], resume=cfg.get('resume', False),
            launcher=cfg.get('launcher', 'none'), env_cfg=cfg.get('env_cfg', dict(dist_cfg=dict(backend='nccl'))),
            log_processor=dict(type='LogProcessor', window_size=10, by_epoch=False),
            log_level=cfg.get('log_level', 'INFO'), visualizer=cfg.get('visualizer'),
            default_scope=cfg.get('default_scope', 'mmdet'),
            randomness=cfg.get('randomness') or dict(seed=ptq.calibration.seed),
            experiment_name=cfg.get('experiment_name'), cfg=cfg)

    # ------------------------------------------------------------------ the run

    def run(self) -> dict:
        """Runs every stage.

        Returns:
            What ``results.json`` holds.
        """
        self.calibrate()
        self.evaluate()
        self.report()
        return self.results

    def calibrate(self) -> nn.Module:
        """Runs the stages up to the integer checkpoint.

        Returns:
            The detector rebuilt from the integer checkpoint.
        """
        check_space(self.work_dir, 6 * float_size_bytes(self.detector))
        if self.checkpoint is not None:
            load_float_checkpoint(self.detector, self.checkpoint)
        if self._test_loop is not None:
            self._check_evaluation()
        calibration = self.calibration
        self.float_detector = copy.deepcopy(self.detector)
        recipe = self.ptq.to_dict()
        global_loss, reconstruct = recipe.pop('global_loss'), recipe.pop('reconstruct')
        recipe.pop('preset')  # only a name: what it stands for is in the other keys
        self.inputs = fingerprint(recipe, str(self.cfg.get('model')), str(self.cfg.get('test_dataloader')),
                                  self._checkpoint_hash(), [str(i) for i in calibration.ids])
        self.reconstruct_inputs = fingerprint(self.inputs, reconstruct)
        self.global_inputs = fingerprint(self.reconstruct_inputs, global_loss)
        self.prepare()
        self.observe()
        if self.ptq.reconstruct is not None:
            self.reconstruct()
        if self.ptq.global_loss is not None:
            self.minimise_global_loss()
        self._save_quantized()
        return self.detector

    @property
    def calibration(self) -> CalibrationDataset:
        """The calibration images, read on first use."""
        if self._calibration is None:
            cfg = self.ptq.calibration
            self._calibration = CalibrationDataset(
                source_datasets(self.cfg, cfg, self._needs_annotations), cfg.num_images, cfg.seed,
                self._evaluation_dataset())
        return self._calibration

    def prepare(self) -> None:
        """Folds, wraps, fits weights; or rebuilds the structure of an earlier run."""

        def work() -> dict:
            self.structure = prepare_detector(self.detector, self.ptq, self._one_image())
            return dict(structure=self.structure.to_dict(), model=self.detector.state_dict())

        state, taken_over = self.stages.run('prepare', self.inputs, work)
        if taken_over:
            self.structure = Structure.from_dict(state['structure'])
            apply_structure(self.detector, self.structure)
            self._load(state['model'])
        share = integer_mac_share(self.structure)
        print_log(f'{share:.2%} of the multiply-accumulates compute in integers', 'current')

    def observe(self) -> None:
        """Sets activation ranges from the calibration images."""

        def work() -> dict:
            loader = self._loader(self.calibration, self.ptq.calibration.batch_size)
            observe_activations(self.detector, loader, self.structure)
            return self.detector.state_dict()

        state, taken_over = self.stages.run('observe', self.inputs, work)
        if taken_over:
            self._load(state)

    def reconstruct(self) -> None:
        """Brings unit after unit back to what it returned in the float detector."""

        def work() -> dict:
            cfg = self.ptq.reconstruct
            method = RECONSTRUCTIONS.build(dict(type=cfg.type, cfg=cfg))
            units = method.run(
                self.detector, self._loader(self.calibration, self.ptq.calibration.batch_size), len(self.calibration),
                Path(self.work_dir) / 'reconstruct' / self.reconstruct_inputs, self.seed, self.stages.resume)
            return dict(units=units, model=self.detector.state_dict())

        state, taken_over = self.stages.run('reconstruct', self.reconstruct_inputs, work)
        if taken_over:
            self._load(state['model'])
        self.units = state['units']

    def minimise_global_loss(self) -> None:
        """Trains all learnable quantization parameters with the filtered global loss."""

        def work() -> dict:
            self._train_global()
            return self.detector.state_dict()

        state, taken_over = self.stages.run('global', self.global_inputs, work)
        if taken_over:
            self._load(state)

    def evaluate(self) -> None:
        """Evaluates the float detector and the one rebuilt from the integer checkpoint."""
        test = str(self.cfg.get('test_dataloader')) + str(self.cfg.get('test_evaluator'))
        self.results = new_results(
            str(self.cfg.filename or ''), self.ptq.to_dict(), self.seed, self.structure, self.calibration.ids,
            self.calibration.skipped)
        if self.units:
            self.results['reconstruction'] = self.units
        float_row, _ = self.stages.run(
            'evaluate_float', fingerprint(self._checkpoint_hash(), str(self.cfg.get('model')), test),
            lambda: self._evaluate(self.float_detector))
        self._row('float', float_row, float_size_bytes(self.float_detector), float_bops(self.structure))
        quantized = Path(self.work_dir) / QUANTIZED
        row, _ = self.stages.run(
            'evaluate_simulated', fingerprint(self.global_inputs, test, tensor_hash(self.detector.state_dict())),
            lambda: self._evaluate(self.detector))
        self._row('simulated', row, quantized.stat().st_size, bops(self.structure))

    def report(self) -> None:
        """Writes ``results.json`` and the page, prints the table."""
        with self.stages.timed('report'):
            batches = [batch for batch, _ in zip(self._test_dataloader, range(4), strict=False)]
            if is_main_process():
                build_report(self.work_dir, self.results, self.structure, self.detector, self.float_detector, batches)
        self._write_results()
        if is_main_process():
            print_results(self.results)
        print_log(f'results, integer checkpoint and report are in {self.work_dir}', 'current')

    # ------------------------------------------------------------------ pieces

    def _check_evaluation(self) -> None:
        """Builds the evaluation's data and metrics before anything that takes long."""
        with evaluation_files():
            self._test_loop = self.build_test_loop(self._test_loop)
        self._test_dataloader = self._test_loop.dataloader

    def _one_image(self) -> Callable[[], Any]:
        loader = self._loader(self.calibration, 1)
        data = self.detector.data_preprocessor(next(iter(loader)), False)
        return lambda: self.detector(**copy.deepcopy(data), mode='predict')

    def _loader(self, dataset: Dataset, batch_size: int, infinite: bool = False) -> DataLoader:
        # built here, not from a config: mmengine would deep-copy the decoded images
        sampler = InfiniteSampler(dataset, seed=self.seed) if infinite else DefaultSampler(dataset, shuffle=False)
        return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=pseudo_collate)

    def _train_global(self) -> None:
        cfg, calibration = self.ptq.global_loss, self.calibration
        held_out = round(len(calibration) * cfg.holdout)
        # the draw is random already: its last images are as good as any
        train = calibration.part(range(len(calibration) - held_out))
        if len(train) == 0:
            raise PTQError('`ptq.global_loss.holdout` leaves no calibration image to train on; lower it.')
        train_only_quantization(self.detector, weights=cfg.weight_lr > 0, biases=cfg.bias_lr > 0)
        model = GlobalLossModel(self.detector, FilteredGlobalLoss(**cfg.loss_kwargs()))
        self.model = self.wrap_model(self.cfg.get('model_wrapper_cfg'), model)
        self._train_dataloader = self._loader(train, min(cfg.batch_size, len(train)), infinite=True)
        self._train_loop = dict(
            type='mmdet_ptq.GlobalCalibrationLoop', max_iters=cfg.iters, val_interval=cfg.val_interval)
        if held_out:
            self._val_dataloader = self._loader(
                calibration.part(range(len(train), len(calibration))), cfg.batch_size)
            self._val_loop = dict(type='mmdet_ptq.HeldOutLossLoop')
        self.optim_wrapper = dict(
            **copy.deepcopy(cfg.optim_wrapper), constructor='mmdet_ptq.QuantizationParamsConstructor',
            paramwise_cfg=dict(lr=cfg.lr, bias_lr=cfg.bias_lr, weight_lr=cfg.weight_lr))
        self.param_schedulers = copy.deepcopy(cfg.param_scheduler) or [dict(
            type='CosineAnnealingLR', by_epoch=False, begin=0, end=cfg.iters, T_max=cfg.iters, eta_min_ratio=1e-2)]
        with self._global_hooks(cfg, held_out > 0), self._inside(Path(self.work_dir) / 'global' / self.global_inputs):
            if not self.stages.resume and is_main_process():
                for stale in Path(self._work_dir).glob('*.pth'):
                    stale.unlink()
            self._load_from = latest_checkpoint(self._work_dir) if self.stages.resume else None
            self._resume, self._has_loaded = self._load_from is not None, False
            for key in ('best_score', 'best_ckpt', 'keep_ckpt_ids', 'last_ckpt'):
                self.message_hub.runtime_info.pop(key, None)
            self.train()
            best = self.message_hub.runtime_info.get('best_ckpt')
            if best is not None:
                print_log(f'the state with the least held-out loss is kept: {Path(best).stem}', 'current')
                self.load_checkpoint(best, strict=True)
        self._has_loaded = True
        self.detector.eval()

    @contextmanager
    def _global_hooks(self, cfg: GlobalLossConfig, held_out: bool) -> Iterator[None]:
        """Hooks of the global stage in place of those of the evaluation."""
        before, self._hooks = self._hooks, []
        # two: mmengine removes the oldest before it writes the next, and a run may be killed in between
        checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=cfg.checkpoint_interval, max_keep_ckpts=2)
        if held_out:
            checkpoint.update(save_best='global_loss', rule='less')
        hook = dict(type='mmdet_ptq.FilteredGlobalLossHook', detector=self.float_detector)
        self.register_hooks(
            dict(logger=dict(type='LoggerHook', interval=cfg.log_interval), checkpoint=checkpoint),
            [hook, *copy.deepcopy(cfg.hooks)])
        try:
            yield
        finally:
            self._hooks = before

    @contextmanager
    def _inside(self, folder: Path) -> Iterator[None]:
        """Makes a folder the work directory for a while: mmengine finds and leaves its checkpoints there."""
        before, self._work_dir = self._work_dir, str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            self._work_dir = before

    def _save_quantized(self) -> None:
        """Writes the integer checkpoint and goes on with the detector rebuilt from it."""
        path = Path(self.work_dir) / QUANTIZED
        meta = getattr(self._evaluation_dataset(), 'metainfo', None)
        if is_main_process():
            # where and how often it was run is no part of the detector: a resumed run writes the same file
            config = {key: value for key, value in self.cfg.to_dict().items() if key not in ('work_dir', 'resume')}
            save_quantized(path, quantized_state(self.detector, self.structure, config, meta))
        barrier()
        self.detector = copy.deepcopy(self.float_detector)
        load_quantized_state(self.detector, read_quantized(path))
        self.detector.to(self._device).eval()
        self.detector.dataset_meta = self.float_detector.dataset_meta = meta or {}
        print_log(f'{path.name}: {path.stat().st_size / 2**20:.2f} MiB', 'current')

    def _evaluate(self, detector: nn.Module) -> dict:
        self.model = self.wrap_model(self.cfg.get('model_wrapper_cfg'), detector)
        return {key: float(value) for key, value in self.test().items()}

    def _row(self, model: str, metrics: dict, size: int, operations: int) -> None:
        self.results['rows'].append(result_row(model, metrics, size, operations))
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

    def _checkpoint_hash(self) -> str:
        if self.checkpoint is None or not Path(self.checkpoint).is_file():
            return str(self.checkpoint)
        return file_hash(self.checkpoint)

    def _load(self, state: dict) -> None:
        self.detector.load_state_dict(state)
        self.detector.to(self._device)

    @property
    def _needs_annotations(self) -> bool:
        return self.ptq.global_loss is not None and self.ptq.global_loss.target == 'ground_truth'

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @staticmethod
    def _inner(model: nn.Module) -> nn.Module:
        return model.module if is_model_wrapper(model) else model
