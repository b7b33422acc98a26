"""What each part of the method adds, and the published baselines, in one run on the same images.

python benchmarks/ablation.py CONFIG [CONFIG ...] --bits w4a8 w4a4 --out docs/results/ablation.csv

The baselines run 20,000 iterations a unit as published; --iters makes them affordable, --steps does so for the global
loss, and the recipe's name tells both. A second run with the same --work-dir takes over what is finished; recipes that
differ in the global loss alone share the stages before it. The last lines, and OUT_pairs.csv, compare each recipe with
--against on the same images and seeds, with a 95 % interval.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from paired import difference_of
from runs import ROOT, run, write_csv

UNTRAINED = 'ptq.global_loss=None'
LOCAL = (UNTRAINED,)
UNIFORM = ('ptq.weights.quantizer.type=mmdet_ptq.AffineQuantizer',)
LOG = (*UNIFORM, 'ptq.head.weights.quantizer.type=mmdet_ptq.LogAffineQuantizer')
# without the filter every prior counts
UNFILTERED = ('ptq.global_loss.score_thr=0.0', 'ptq.global_loss.iou_thr=0.0', 'ptq.global_loss.max_boxes=None')
# what low-bit presets add to the inputs of layers
UNMOVED = ('ptq.activations.scale_migration=0.0',)
PUBLISHED_ITERS = 20000
ROUNDED = ('ptq.reconstruct=None', UNTRAINED, *UNIFORM)
PAIRS = ('detector', 'bits', 'recipe', 'against', 'seeds', 'images', 'points', 'low', 'high')


def published(method: str) -> tuple[str, ...]:
    """Options of a published method; what is in braces is filled in later."""
    return (
        f'ptq.reconstruct.method={method}',
        'ptq.reconstruct.iters={iters}',
        'ptq.reconstruct.rounding_lr={rounding_lr}',
        UNTRAINED,
        *UNIFORM,
        *UNMOVED,
    )


def rounding_rate(iters: int) -> float:
    """Rate of the rounding: the published one, raised where few iterations could not move it from where it starts.

    With 300 iterations at the published rate QDrop leaves held-out errors of blocks a third larger.

    Args:
        iters: Iterations per unit.
    """
    return min(1e-3 * PUBLISHED_ITERS / iters, 1e-2)


# QDrop's blocks in place of the closed form, with the preset's grids, migrated scales and Fisher weights
LEARNED = (
    'ptq.reconstruct.method=qdrop',
    'ptq.reconstruct.iters={iters}',
    'ptq.reconstruct.rounding_lr={rounding_lr}',
    'ptq.reconstruct.fisher=0.9',
)

RECIPES = {
    'rounding': (*ROUNDED, *UNMOVED),
    'rounding, scales migrated': (*ROUNDED, 'ptq.activations.scale_migration=1.0'),
    'adaround': published('adaround'),
    'brecq': published('brecq'),
    'qdrop': published('qdrop'),
    'ours, uniform, local, scales not migrated': (*LOCAL, *UNIFORM, *UNMOVED),
    'ours, uniform, local': (*LOCAL, *UNIFORM),
    'ours, log-affine head, local': (*LOCAL, *LOG),
    'ours, best format a layer, local, outputs alike': (*LOCAL, 'ptq.reconstruct.fisher=0'),
    'ours, best format a layer, local, scales as observed': (*LOCAL, 'ptq.reconstruct.search_scales=False'),
    'ours, best format a layer, local': LOCAL,
    'ours, uniform, + global': (*UNFILTERED, *UNIFORM),
    'ours, uniform, + filter': UNIFORM,
    'ours, log-affine head, + global': (*UNFILTERED, *LOG),
    'ours, log-affine head, + filter': LOG,
    'ours, best format a layer, + global': UNFILTERED,
    'ours': (),
    'ours, from rounding': ('ptq.reconstruct=None',),
    'ours, rounding learned, local': (UNTRAINED, *LEARNED),
    'ours, rounding learned': LEARNED,
}

BEFORE_GLOBAL = ('prepare', 'observe', 'protect', 'reconstruct')


def begin_with(folder: Path, finished: dict[tuple, Path], key: tuple) -> None:
    """Gives a recipe the calibration that an earlier one finished before its global loss; the run checks their inputs.

    Args:
        folder: Work directory of the recipe; left alone where it has stages of its own.
        finished: Work directories of earlier recipes, by all of their options but the global loss's.
        key: These options of the recipe.
    """
    stages = folder / 'stages'
    if key in finished and not stages.exists():
        stages.mkdir(parents=True)
        for stage in BEFORE_GLOBAL:
            path = finished[key] / 'stages' / f'{stage}.pth'
            if path.is_file():
                shutil.copy(path, stages)
    finished.setdefault(key, folder)


def before_global(options: Sequence[str]) -> tuple[str, ...]:
    """The options that decide what precedes the global loss."""
    return tuple(option for option in options if not option.startswith('ptq.global_loss'))


def shortened(recipe: Sequence[str], iters: int, steps: int | None) -> tuple[list[str], str]:
    """The options of a recipe with its iterations, and what its name says of them.

    Args:
        recipe: Its options.
        iters: Iterations per unit, for a published method.
        steps: Iterations of the global loss, where the recipe has one; None leaves the preset's.
    """
    options = [option.format(iters=iters, rounding_lr=rounding_rate(iters)) for option in recipe]
    if options != list(recipe):
        return options, f' ({iters} iterations)'
    if steps is None or UNTRAINED in options:
        return options, ''
    return [*options, f'ptq.global_loss.iters={steps}'], f' ({steps} steps)'


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--bits', nargs='+', default=['w8a8', 'w4a8', 'w4a4'], help='presets')
    parser.add_argument('--recipes', nargs='+', default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument(
        '--iters', type=int, default=PUBLISHED_ITERS, help='iterations per unit of the published methods'
    )
    parser.add_argument('--steps', type=int, help='iterations of the global loss, if not those of the preset')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='of the images and of the training')
    parser.add_argument('--against', choices=list(RECIPES), default='ours', help='recipe that others are compared with')
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'ablation')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='changes to every config')
    args = parser.parse_args(argv)
    lines, finished, folders = [], {}, defaultdict(list)
    for config in args.configs:
        for bits in args.bits:
            for seed in args.seeds:
                for recipe in args.recipes:
                    options, trained = shortened(RECIPES[recipe], args.iters, args.steps)
                    name = re.sub('[ ,()]+', '_', recipe + trained).strip('_')
                    folder = args.work_dir.resolve() / config.stem / bits / name
                    if seed:
                        folder = folder.with_name(f'{folder.name}_seed{seed}')
                    folders[config.stem, bits, recipe].append(folder)
                    begin_with(folder, finished, (config, bits, seed, before_global(options)))
                    lines.append(
                        run(
                            config.resolve(),
                            f'{bits} {recipe}{trained}',
                            bits,
                            folder,
                            options,
                            args.cfg_options,
                            ['--seed', str(seed)] if seed else (),
                        )
                    )
                    write_csv(args.out, lines)
    if len(args.recipes) > 1 and args.against in args.recipes:
        compare_pairs(folders, args.against, len(args.seeds), args.out.with_name(f'{args.out.stem}_pairs.csv'))


def compare_pairs(folders: dict[tuple, list[Path]], against: str, seeds: int, out: Path) -> None:
    """Prints and writes how each recipe differs from another on the same images and seeds.

    Args:
        folders: Detector, preset and recipe to the work directories, one for each seed.
        against: The recipe that all others are compared with.
        seeds: How many seeds there are.
        out: CSV file.
    """
    lines = []
    for (detector, bits, recipe), after in folders.items():
        if recipe != against:
            points, low, high, images = difference_of(folders[detector, bits, against], after)
            values = (detector, bits, recipe, against, seeds, images, *(f'{x:.2f}' for x in (points, low, high)))
            lines.append(dict(zip(PAIRS, values, strict=True)))
            print(f'{detector} {bits}: {recipe!r} against {against!r}: {points:+.2f} points, {low:+.2f} to {high:+.2f}')
    write_csv(out, lines, PAIRS)


if __name__ == '__main__':
    main()
