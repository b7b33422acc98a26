"""What `ptq.saturation='safe'` costs: weights in 8 bits with and without the bound, everything else float.

python benchmarks/bound.py CONFIG [CONFIG ...] --draws 5 --out docs/results/bound.csv

On a few hundred images AP moves by half a point where nothing but the roundings change. So each setting is measured
several times, the scale of every channel widened by up to 2 % at random: the means and their standard error say what
the bound does, not what one draw of roundings does.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from runs import METRIC, ROOT, VERSIONS, one_sentence, write_csv
from torch import nn

from mmdet_ptq.analysis import versions
from mmdet_ptq.cli import load_config
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.testing import raw_outputs
from mmdet_ptq.wrapping import quantized_weights
from mmdet_ptq.wrapping.state import quantize_only

SETTINGS = ('ignore', 'safe')
WIDEST = 0.02
FIELDS = (
    'detector',
    'float_AP',
    'ignore_AP',
    'safe_AP',
    'difference_points',
    'standard_error',
    'ignore_dB',
    'safe_dB',
    'wider_channels',
    'layers',
    'draws',
    'ignore_APs',
    'safe_APs',
    'date',
    *VERSIONS,
    'command',
)


def measure(config: Path, args: argparse.Namespace) -> dict:
    """A line: both settings of one detector."""
    found, decibels, scales, float_ap = {}, {}, {}, math.nan
    for saturation in SETTINGS:
        cfg = load_config(str(config), args.cfg_options)
        cfg.work_dir = str(args.work_dir.resolve() / config.stem / saturation)
        cfg.ptq, cfg.resume = dict(preset='w8a8_observe', saturation=saturation, calibration=dict(num_images=8)), True
        runner = PTQRunner.from_cfg(cfg)
        runner.begin()
        runner.prepare()
        detector, weights = runner.detector, quantized_weights(runner.detector)
        batches = list(runner.first_images(8))
        if saturation == SETTINGS[0]:
            float_ap = runner.evaluate_detector(runner.float_detector)[METRIC]
        scales[saturation] = torch.cat([q.quantizer.positive_scale().detach() for q in weights.values()])
        fitted = {name: q.quantizer.scale.detach().clone() for name, q in weights.items()}
        found[saturation], decibels[saturation] = [], []
        for draw in range(args.draws):
            generator = torch.Generator().manual_seed(draw)
            with torch.no_grad():
                for name, quantized in weights.items():
                    wider = 1 + WIDEST * torch.rand(fitted[name].shape, generator=generator)
                    quantized.quantizer.scale.copy_(fitted[name] * wider)
            with quantize_only(detector, (), list(weights)):
                found[saturation].append(runner.evaluate_detector(detector)[METRIC])
                decibels[saturation].append(signal_to_noise(runner.float_detector, detector, batches))
    means = {name: statistics.mean(values) for name, values in found.items()}
    spread = math.sqrt(sum(statistics.variance(values) / len(values) for values in found.values()))
    return dict(
        detector=config.stem,
        float_AP=float_ap,
        difference_points=round(100 * (means['safe'] - means['ignore']), 2),
        standard_error=round(100 * spread, 2),
        wider_channels=round(float((scales['safe'] > 1.0001 * scales['ignore']).float().mean()), 3),
        layers=len(weights),
        draws=args.draws,
        date=datetime.now(timezone.utc).date().isoformat(),
        command=f'python benchmarks/bound.py {config.name} --draws {args.draws}',
        **{f'{name}_AP': round(means[name], 4) for name in SETTINGS},
        **{f'{name}_dB': round(statistics.mean(decibels[name]), 2) for name in SETTINGS},
        **{f'{name}_APs': ' '.join(f'{value:.3f}' for value in found[name]) for name in SETTINGS},
        **{name: versions()[name] for name in VERSIONS},
    )


@torch.no_grad()
def signal_to_noise(reference: nn.Module, detector: nn.Module, batches: list[dict]) -> float:
    """Of the raw head outputs, in dB, each output counting alike."""
    ratios = []
    for batch in batches:
        expected, got = raw_outputs(reference, batch), raw_outputs(detector, batch)
        ratios += [
            10 * math.log10(float(a.square().mean() / (a - b).square().mean().clamp_min(1e-30)))
            for a, b in zip(expected, got, strict=True)
        ]
    return statistics.mean(ratios)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--draws', type=int, default=5, help='of roundings, for each setting')
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'bound')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='changes that change no figure')
    args = parser.parse_args(argv)
    lines = []
    for config in args.configs:
        lines.append(measure(config.resolve(), args))
        write_csv(args.out, lines, FIELDS)


if __name__ == '__main__':
    one_sentence(main)
