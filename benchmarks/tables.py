"""Prints the ablation as a table: a line per recipe, a column per detector and width.

python benchmarks/tables.py docs/results/ablation.csv --detectors yolox_nano_coco --bits w4a8 w4a4
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

LABELS = {
    'rounding': 'rounded to the nearest, uniform grids',
    'adaround': 'AdaRound, {} iterations a layer',
    'brecq': 'BRECQ, {} iterations a block',
    'qdrop': 'QDrop, {} iterations a block',
    'ours, uniform, local': 'ours, uniform, local (closed form)',
    'ours, uniform, + global': 'ours, uniform, + global loss, unfiltered',
    'ours, uniform, + filter': 'ours, uniform, + global loss, filtered',
    'ours, log-affine head, local': 'ours, log-affine head, local',
    'ours, log-affine head, + global': 'ours, log-affine head, + global loss, unfiltered',
    'ours, log-affine head, + filter': 'ours, log-affine head, + global loss, filtered',
    'ours, best format a layer, local': 'ours, in each layer the grid of less error, local',
    'ours, best format a layer, local, outputs alike': 'that, without Fisher weights',
    'ours, best format a layer, local, scales as observed': 'that, activation scales as observed',
    'ours, best format a layer, + global': 'ours, in each layer the grid of less error, + global loss, unfiltered',
    'ours': '**ours**, the preset: the same, filtered',
    'ours, rounding learned, local': 'ours, blocks trained as in QDrop, {} iterations',
    'ours, rounding learned': 'ours, that, + global loss, filtered',
}


def table(
    rows: Sequence[dict],
    detectors: Sequence[str],
    bits: Sequence[str],
    processor: str = '',
    *,
    seed: int = 0,
    images: int | None = None,
    steps: bool = False,
    seconds: bool = False,
) -> str:
    """A Markdown table of simulated AP.

    Args:
        rows: Lines of ablation.csv; of several for one cell the last counts.
        detectors: The detectors, one after another.
        bits: Presets, the columns of each detector.
        processor: Only rows of processors whose name holds this. Defaults to all.
        seed: Only rows of this seed. Defaults to 0.
        images: Only rows of so many calibration images. Defaults to any number.
        steps: Whether rows with fewer steps of the global loss than the preset's count. Defaults to False.
        seconds: Whether the seconds of calibration stand behind the AP. Defaults to False.

    Returns:
        The table; recipes without any figure are left out, and a missing figure is an empty cell.
    """
    cells, iterations = {}, {}
    for row in rows:
        width, _, recipe = row['recipe'].partition(' ')
        recipe, _, shortened = recipe.partition(' (')
        if (
            processor in row['processor']
            and row['seed'] == str(seed)
            and (steps or 'steps' not in shortened)
            and images in (None, int(row['calibration_images']))
        ):
            cells[recipe, row['detector'], width] = (
                f'{float(row["quantized_AP"]):.3f}' + seconds * f' ({row["calibration_seconds"]})'
            )
            iterations[recipe, row['detector'], width] = shortened.partition(' ')[0]
    columns = [(detector, width) for detector in detectors for width in bits]
    head = [f'{width.upper()}' if len(detectors) == 1 else f'{detector} {width.upper()}' for detector, width in columns]
    lines = ['| | ' + ' | '.join(head) + ' |', '|---|' + '---:|' * len(columns)]
    for recipe, label in LABELS.items():
        found = [cells.get((recipe, *column), '') for column in columns]
        if any(found):
            counts = {iterations[(recipe, *column)] for column in columns if (recipe, *column) in iterations}
            lines.append(f'| {label.format(" or ".join(sorted(counts)))} | ' + ' | '.join(found) + ' |')
    return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('csv', type=Path)
    parser.add_argument('--detectors', nargs='+', required=True)
    parser.add_argument('--bits', nargs='+', default=['w8a8', 'w4a8', 'w4a4'])
    parser.add_argument('--processor', default='', help='part of its name')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--images', type=int, help='of calibration; any number by default')
    parser.add_argument('--steps', action='store_true', help='runs with fewer steps of the global loss, too')
    parser.add_argument('--seconds', action='store_true', help='of calibration, in brackets')
    args = parser.parse_args(argv)
    with args.csv.open(encoding='utf-8') as file:
        print(
            table(
                list(csv.DictReader(file)),
                args.detectors,
                args.bits,
                args.processor,
                seed=args.seed,
                images=args.images,
                steps=args.steps,
                seconds=args.seconds,
            ),
            end='',
        )


if __name__ == '__main__':
    main()
