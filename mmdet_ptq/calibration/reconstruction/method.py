"""Local reconstruction: the quantized detector is brought back to the float one unit by unit."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.calibration.reconstruction.activation_store import ActivationStore
from mmdet_ptq.calibration.reconstruction.streams import FLOAT, QUANTIZED, Streams
from mmdet_ptq.calibration.reconstruction.unit_data import UnitData
from mmdet_ptq.calibration.reconstruction.unit_training import UnitResult, UnitTrainer, devices_of
from mmdet_ptq.calibration.reconstruction.units import Passage, Unit, find_passages, find_units
from mmdet_ptq.config import ReconstructConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import load_tensors, save_tensors
from mmdet_ptq.predictions import needs_reference, predict_aligned
from mmdet_ptq.progress import step, track
from mmdet_ptq.wrapping import quantization_mode


class BlockReconstruction:
    """Reconstruction of one unit after another, with cached inputs.

    Its options give AdaRound (Nagel et al., ICML 2020), BRECQ (Li et al., ICLR 2021), QDrop (Wei et al., ICLR 2022)
    and the local step of Reg-PTQ (Ding et al., CVPR 2024): see the presets.

    Args:
        cfg: The ``reconstruct`` section.
    """

    def __init__(self, cfg: ReconstructConfig) -> None:
        self.cfg = cfg

    def run(
        self,
        detector: nn.Module,
        batches: Collection[dict],
        held_out: Collection[dict],
        folder: Path,
        seed: int,
        resume: bool,
    ) -> list[dict]:
        """Reconstructs a quantized detector whose activation ranges are set, in place.

        Args:
            detector: The quantized detector, in eval mode.
            batches: Calibration batches as a dataloader yields them.
            held_out: Others, which units are judged by; without any, units are judged by ``batches``.
            folder: Where finished units (to go on from) and activations that do not fit in memory are kept.
            seed: Seed of the sampling.
            resume: Whether units that an earlier run has finished are taken over.

        Returns:
            One dict per unit: name, held-out error before and after, outcome, seconds.
        """
        store = ActivationStore(int(self.cfg.cache_gib * 2**30), folder)
        try:
            return self._run(detector, batches, held_out, folder, seed, resume, store)
        finally:
            store.close()
            for parameter in detector.parameters():
                parameter.grad = None

    def _run(self, detector, batches, held_out, folder, seed, resume, store) -> list[dict]:
        trained, count = len(batches), len(batches) + len(held_out)
        data = (detector.data_preprocessor(batch, False) for batch in itertools.chain(batches, held_out))
        first = next(data)
        units, passages = self._units(detector, first)
        streams = Streams(detector, units, store, passages)
        # the Fisher weights are drawn: a run that is resumed here draws the same
        with torch.random.fork_rng(devices=devices_of(streams.device)):
            torch.manual_seed(seed)
            for batch in track(
                itertools.chain([first], data),
                total=count,
                description='weighing outputs' if self.cfg.fisher else 'float outputs',
            ):
                streams.add(batch, needs_reference(detector), self.cfg.fisher > 0)
        samples = [(b, i) for b, batch in enumerate(streams.batches) for i in range(len(batch.samples))]
        train = [(b, i) for b, i in samples if b < trained]
        results, taken, done = [], set(), 0.0
        print_log(f'reconstructing {len(units)} units, {sum(len(u.layers) for u in units)} layers', 'current')
        for index, unit in enumerate(units):
            start = time.perf_counter()
            path = folder / f'{index:03d}.pth'
            float_inputs = streams.collect(unit, FLOAT)
            inputs = streams.collect(unit, QUANTIZED)
            with quantization_mode(detector, QUANTIZED):
                trainer = UnitTrainer(
                    UnitData(streams, unit, inputs, float_inputs, self.cfg, train, samples[len(train) :]), taken
                )
                result = self._taken_over(trainer, path) if resume else None
                if result is None:
                    self._check_images(trainer.data, len(train))
                    result = trainer.run(seed + index)
                    result.seconds = round(time.perf_counter() - start, 2)
                    if is_main_process():
                        save_tensors(path, dict(result=asdict(result), state=trainer.snapshot()))
            streams.forget(float_inputs)
            streams.finish(unit, inputs)
            taken |= set(trainer.activations)
            results.append(asdict(result))
            done += time.perf_counter() - start
            step('reconstructing units', index + 1, len(units))
            self._log(index, len(units), result, done)
        return results

    def _units(self, detector: nn.Module, data: dict) -> tuple[list[Unit], list[Passage]]:
        images, samples, reference = data['inputs'][:1].clone(), data['data_samples'][:1], None
        if needs_reference(detector):
            # as in every later pass, whose second stage depends on no proposals of its own
            with torch.no_grad(), quantization_mode(detector, FLOAT):
                reference = predict_aligned(detector, images, samples).detach()
        images.requires_grad_()

        def run() -> None:
            predict_aligned(detector, images, samples, reference=reference)

        with quantization_mode(detector, FLOAT):
            units = find_units(detector, run, self.cfg.granularity, self.cfg.units)
            passages = find_passages(detector, run, units)
        if not units:
            raise PTQError('`ptq.reconstruct` finds no quantized layer in the detector; remove the key.')
        return units, passages

    def _taken_over(self, trainer: UnitTrainer, path: Path) -> UnitResult | None:
        if not path.is_file():
            return None
        try:
            saved = load_tensors(path)
        except PTQError as error:
            print_log(
                f'{error}; the unit {trainer.data.unit.name} is reconstructed again', 'current', level=logging.WARNING
            )
            return None
        trainer.restore(saved['state'])
        return UnitResult(**saved['result'])

    def _check_images(self, data: UnitData, images: int) -> None:
        """Warns where a layer has more weights per output channel than the images give equations."""
        positions = max(data.positions(), 1)
        for name, weight in data.weights.items():
            fan_in = weight.layout.to_rows(data.layers[name].parametrizations.weight.original).shape[1]
            needed = math.ceil(fan_in / positions)
            if images < needed:
                print_log(
                    f'{images} calibration images are few for {name}, which has {fan_in} weights per output '
                    f'channel: {needed} are needed (`ptq.calibration.num_images`)',
                    'current',
                    level=logging.WARNING,
                )

    def _log(self, index: int, count: int, result: UnitResult, seconds: float) -> None:
        left = seconds / (index + 1) * (count - index - 1)
        end = {
            'restored': '; training did not help, the state before is restored',
            'diverged': '; training diverged, the best state before is kept',
            'good enough': '; good enough as it is',
        }.get(result.outcome, '')
        print_log(
            f'reconstruct [{index + 1}/{count}] {result.name}: held-out error {result.before:.4g} -> '
            f'{result.after:.4g}, {result.seconds:.1f} s, eta {int(left) // 60} min {int(left) % 60:02d} s{end}',
            'current',
            level=logging.WARNING if result.outcome in ('restored', 'diverged') else logging.INFO,
        )
