"""What `ptq.saturation='safe'` costs: AP and signal to noise with and without the bound, over calibration seeds.

python benchmarks/bound.py CONFIG [CONFIG ...] --preset w8a8_observe --seeds 0 1 2 --out docs/results/bound.csv

Both detectors of a pair have the same calibration images. One detector's AP moves by half a point where nothing but the
draw of the images changes: the mean over seeds and its standard error say what the bound does.
"""
from __future__ import annotations

import argparse
import copy
import math
import statistics
from datetime import datetime, timezone
from pathlib import Path

import torch
from runs import METRIC, ROOT, one_sentence, write_csv
from torch import nn

from mmdet_ptq.analysis import versions
from mmdet_ptq.cli import load_config
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.testing import raw_outputs
from mmdet_ptq.wrapping import quantized_weights
from mmdet_ptq.wrapping.inputs import quantize_only

VERSIONS = ('mmdet_ptq', 'torch', 'mmdet', 'mmcv', 'mmengine', 'numpy', 'python', 'processor')
SETTINGS = ('ignore', 'safe')
FIELDS = ('detector', 'preset', 'seed', 'float_AP', 'ignore_AP', 'safe_AP', 'difference_points', 'ignore_weights_AP',
          'safe_weights_AP', 'ignore_dB', 'safe_dB', 'wider_channels', 'mean_difference', 'standard_error',
          'calibration_images', 'date', *VERSIONS, 'command')


def measure(config: Path, preset: str, seed: int, args: argparse.Namespace) -> dict:
    """A line: both settings with the same calibration images."""
    line, scales, images = dict(detector=config.stem, preset=preset, seed=seed), {}, 0
    for saturation in SETTINGS:
        cfg = load_config(str(config), args.cfg_options)
        cfg.work_dir = str(args.work_dir.resolve() / config.stem / f'{preset}_{saturation}_{seed}')
        block = dict(cfg.get('ptq') or {}, preset=preset, saturation=saturation, dataflow='auto', export=[])
        block['calibration'] = {**block.get('calibration', {}), 'num_images': args.images, 'seed': seed}
        cfg.ptq, cfg.resume = block, True
        runner = PTQRunner.from_cfg(cfg)
        detector = runner.calibrate()
        images = len(runner.calibration)
        if seed == args.seeds[0] and saturation == SETTINGS[0]:
            line['float_AP'] = _stored(runner, 'float', runner.float_detector)
        line[f'{saturation}_AP'] = _stored(runner, saturation, detector)
        scales[saturation] = [q.quantizer.positive_scale().detach() for q in quantized_weights(detector).values()
                              if getattr(q.quantizer, 'bits', 0) == 8 and hasattr(q.quantizer, 'positive_scale')]
        if seed == args.seeds[0]:
            # weights alone: what the activations cost hides less of it
            with quantize_only(detector, (), list(quantized_weights(detector))):
                line[f'{saturation}_weights_AP'] = _stored(runner, f'{saturation}_weights', detector)
                line[f'{saturation}_dB'] = round(signal_to_noise(
                    runner.float_detector, detector, list(runner.first_images(8))), 2)
    wider = [(safe > 1.0001 * ignored).float() for ignored, safe in zip(*scales.values(), strict=True)]
    return dict(line, wider_channels=round(float(torch.cat([w.flatten() for w in wider]).mean()), 3) if wider else '',
                difference_points=round(100 * (line['safe_AP'] - line['ignore_AP']), 1), calibration_images=images,
                date=datetime.now(timezone.utc).date().isoformat(), **{name: versions()[name] for name in VERSIONS})


def _stored(runner: PTQRunner, name: str, detector: nn.Module) -> float:
    """AP; taken over where it was measured before."""
    found, _ = runner.stages.run(f'bound_{name}', runner.inputs['global'],
                                 lambda: runner.evaluate_detector(copy.deepcopy(detector)))
    return found[METRIC]


@torch.no_grad()
def signal_to_noise(reference: nn.Module, detector: nn.Module, batches: list[dict]) -> float:
    """Of the raw head outputs, in dB, each output counting alike."""
    ratios = []
    for batch in batches:
        expected, got = raw_outputs(reference, batch), raw_outputs(detector, batch)
        ratios += [10 * math.log10(float(a.square().mean() / (a - b).square().mean().clamp_min(1e-30)))
                   for a, b in zip(expected, got, strict=True)]
    return statistics.mean(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--preset', default='w8a8_observe')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--images', type=int, default=128, help='calibration images')
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'bound')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='changes that change no figure')
    args = parser.parse_args()
    lines = []
    for config in args.configs:
        mine = [measure(config.resolve(), args.preset, seed, args) for seed in args.seeds]
        differences = [100 * (line['safe_AP'] - line['ignore_AP']) for line in mine]
        spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
        for line in mine:
            line.update(mean_difference=round(statistics.mean(differences), 2), standard_error=round(spread, 2),
                        command=f'python benchmarks/bound.py {config.name} --preset {args.preset} --images '
                                f'{args.images} --seeds {" ".join(map(str, args.seeds))}')
        lines += mine
        write_csv(args.out, lines, FIELDS)


if __name__ == '__main__':
    one_sentence(main)
